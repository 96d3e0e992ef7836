"""Fuzz lfx for a given time, and write docs/records/fuzz.jsonl.

    python scripts/fuzz.py --minutes 60

Each round runs every target of scripts/fuzz_targets.py (manifests, plans, metadata, ONNX files) for a minute, on a
corpus that grows in build/fuzz, and the property tests (tests/**/test_*_properties.py) with a new seed and ten times
the examples of `make test`. The first failure is printed and ends the run with exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from typing import Any

import record

from lfx.errors import require

EXAMPLES = 2000  # per property test and round
SECONDS = 60  # per target and round
CORPUS = record.ROOT / "build" / "fuzz"
TARGETS = ("manifest", "plan", "signature", "onnx")


def main() -> None:
    """Fuzz in rounds until the time is over, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    options = parser.parse_args()
    require("atheris", "fuzz")
    _seed_corpora()
    start, turn = time.monotonic(), 0
    end = start + 60 * options.minutes
    tests = sorted(str(path.relative_to(record.ROOT)) for path in record.ROOT.glob("tests/**/test_*_properties.py"))
    runs = dict.fromkeys(TARGETS, 0)
    passed = 0
    while time.monotonic() < end:
        turn += 1
        for target in TARGETS:
            runs[target] += fuzz(target, max(int(min(SECONDS, end - time.monotonic())), 1))
        for test in tests if time.monotonic() < end else ():
            passed += properties(test, seed=turn + int(time.time()))
        print(f"turn {turn}: {(time.monotonic() - start) / 60:.1f} minutes, {runs}, {passed} tests", flush=True)
    row: dict[str, Any] = {
        "minutes": (time.monotonic() - start) / 60,
        "turns": turn,
        "property_tests": tests,
        "property_tests_passed": passed,
        "examples_a_test": EXAMPLES,
        "target_runs": runs,
        "failures": 0,
    }
    record.write("fuzz", [{**record.environment(), **row}])


def fuzz(target: str, seconds: int) -> int:
    """Run one target; returns the number of inputs that it ran on."""
    corpus = CORPUS / target
    command = [sys.executable, "scripts/fuzz_targets.py", target, str(corpus), f"-max_total_time={seconds}"]
    command += [f"-artifact_prefix={CORPUS}/{target}-", "-max_len=200000", "-print_final_stats=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=record.ROOT)
    if done.returncode != 0:
        sys.exit(f"{target} failed; the input is in {CORPUS}\n{done.stderr[-4000:]}")
    executed = re.search(r"number_of_executed_units:\s*(\d+)", done.stderr)
    return int(executed[1]) if executed else 0


def properties(test: str, seed: int) -> int:
    """Run one file of property tests; returns the number of tests that passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--hypothesis-seed={seed}", test]
    environment = {**os.environ, "LFX_FUZZ_EXAMPLES": str(EXAMPLES)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=record.ROOT, env=environment)
    if done.returncode != 0:
        sys.exit(f"{test} failed with --hypothesis-seed={seed}\n{done.stdout[-6000:]}")
    passed = re.search(r"(\d+) passed", done.stdout)
    return int(passed[1]) if passed else 0


def _seed_corpora() -> None:
    """Write one valid input into each target's corpus."""
    from lfx.export import export
    from lfx.manifest import MANIFEST, MODEL

    sys.path.insert(0, str(record.ROOT))
    from tests.models import tiny_model
    from tests.test_manifest_properties import PLAN_DATA, SIGNATURE

    folder = CORPUS / "bundle"
    if not folder.is_dir():
        CORPUS.mkdir(parents=True, exist_ok=True)
        export(tiny_model(), folder)
    seeds = {
        "manifest": (folder / MANIFEST).read_bytes(),
        "plan": json.dumps(PLAN_DATA).encode(),
        "signature": json.dumps(SIGNATURE.to_dict()).encode(),
        "onnx": (folder / MODEL).read_bytes(),
    }
    for target, content in seeds.items():
        (CORPUS / target).mkdir(exist_ok=True)
        (CORPUS / target / "seed").write_bytes(content)


if __name__ == "__main__":
    main()
