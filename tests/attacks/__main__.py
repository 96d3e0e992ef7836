"""`python -m tests.attacks [NAME …]`: run attacks by hand, each in a temporary folder, and print the refusals."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.attacks import NAMES, run

for name in sys.argv[1:] or NAMES:
    with tempfile.TemporaryDirectory() as folder:
        print(f"{name}: {run(name, Path(folder))}")
