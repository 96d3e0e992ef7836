"""`python -m lfx.cli`."""

from __future__ import annotations

from lfx.cli import main

if __name__ == "__main__":
    main()
