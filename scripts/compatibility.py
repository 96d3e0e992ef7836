"""Run the clients of tests/clients, and write docs/records/compatibility.jsonl.

    python -m scripts.compatibility

`make clients` sets up their environments first.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from scripts import record
from tests.clients import clients
from tests.clients.models import expected, make_models


def main() -> None:
    """Run every case, and write the record."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if (reason := clients.missing()) is not None:
        sys.exit(reason)
    versions = clients.versions()
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder))
        rows = [_row(case, Path(folder) / case.folder, versions) for case in clients.CASES]
    print(record.write("compatibility", rows))


def _row(case: clients.Case, model: Path, versions: dict[str, str]) -> dict[str, Any]:
    result = clients.run(case, model)
    row = {"client": case.client, "version": versions[case.client], "model": case.model, "how": case.how}
    print(case, result.get("error", "runs"))
    if "error" in result:
        return {**row, "date": record.environment()["date"], "error": result["error"]}
    answer = expected(model, case.output)
    difference = float(np.abs(np.reshape(result[case.output], answer.shape) - answer).max())
    is_right = difference <= clients.TOLERANCE
    date = record.environment()["date"]
    return {**row, "date": date, "output": case.output, "max_difference": difference, "is_right": is_right}


if __name__ == "__main__":
    main()
