"""The whole fuzz campaign: 50 times the inputs of `make test`, and what became of them.

    python benchmarks/fuzz.py                     # a quarter of an hour on two cores
    python benchmarks/fuzz.py --times 5 --seed 1 --out /tmp/fuzz.json  # others, and fewer
    python benchmarks/fuzz.py test_videos.py      # one file once more, in its place in the record

Every entrance of `tests/fuzz` gets its inputs, drawn from the seed. Each is refused with one
message, or read right; all else fails, and is shown with the seed and number that give it again.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks/results/fuzz.json"
PACKAGES = ("hypothesis", "safetensors", "av", "ml_collections", "transformers", "jax")


def run(file: Path, times: float, seed: int) -> tuple[int, dict]:
    """pytest's exit code for one file of tests, and its counts by entrance."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "tally.json"
        environment = {
            **os.environ,
            "QVGEN_FUZZ": str(times),
            "QVGEN_FUZZ_SEED": str(seed),
            "QVGEN_FUZZ_RESULT": str(result),
        }
        command = [sys.executable, "-m", "pytest", str(file)]
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        return code, json.loads(result.read_text()) if result.is_file() else {}


def counted(counts: dict[str, int]) -> dict[str, int]:
    """One entrance's inputs; what was neither refused nor right has failed."""
    refused, right = counts.get("refused", 0), counts.get("right", 0)
    failures = counts["tried"] - refused - right
    return {"inputs": counts["tried"], "refused": refused, "right": right, "failures": failures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", help="of tests/fuzz; all if none is named")
    parser.add_argument("--times", type=float, default=50, help="of what `make test` tries")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    command = f"python benchmarks/fuzz.py --times {arguments.times:g} --seed {arguments.seed}"
    record = {"command": command, "versions": {}, "files": {}}
    if arguments.files and arguments.out.is_file():
        record = json.loads(arguments.out.read_text())
        if record["command"] != command:
            parser.error(f"{arguments.out} is of other inputs: {record['command']}")
    record["versions"] = {"python": platform.python_version()} | {x: version(x) for x in PACKAGES}
    for file in sorted((ROOT / "tests/fuzz").glob("test_*.py")):
        if arguments.files and file.name not in arguments.files:
            continue
        start = time.monotonic()
        code, tally = run(file, arguments.times, arguments.seed)
        record["files"][file.name] = {
            "passed": not code,
            "seconds": round(time.monotonic() - start),
            "entrances": {name: counted(counts) for name, counts in tally.items()},
        }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["files"], indent=1))
    return not all(file["passed"] for file in record["files"].values())


if __name__ == "__main__":
    sys.exit(main())
