"""`make explore`: the randomised tests with new draws, round after round until the time is over or a test fails.

Each round has a seed, from which all draws of it come: that of hypothesis, and the variable RESIDSCOPE_EXPLORE, by
which `tests/explore` and torch's generator are seeded. The command that repeats a failure is printed.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
NOTHING_COLLECTED = 5


def round_of(seed: int, words: list[str]) -> int:
    """Run the randomised tests (those in `words`, or all) with this seed; the exit code of pytest."""
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "--hypothesis-profile=explore"]
    more = ROOT / "tests/explore"
    asked = [words] if words else [["-m", "hypothesis", "tests"], *([[str(more)]] if more.is_dir() else [])]
    for selection in asked:
        command = [*pytest, f"--hypothesis-seed={seed}", *selection]
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, "RESIDSCOPE_EXPLORE": str(seed)}).returncode
        if code not in (0, NOTHING_COLLECTED):
            return code
    return 0


def main() -> int:
    """Run rounds; 0 if none failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time", type=float, default=0, help="seconds after which no round begins; default one round")
    parser.add_argument("--seed", type=int, help="of the first round, the next ones count up; default from the clock")
    parser.add_argument("tests", nargs="*", help="tests to run; default all randomised ones")
    arguments = parser.parse_args()
    seed = time.time_ns() // 1000 % 2**31 if arguments.seed is None else arguments.seed
    end = time.monotonic() + arguments.time
    while True:
        print(f"seed {seed}", flush=True)
        if code := round_of(seed, arguments.tests):
            print(f"To repeat it: make explore SEED={seed}, or one test: SEED={seed} TESTS=FILE::NAME")
            return code
        seed = (seed + 1) % 2**31
        if time.monotonic() >= end:
            return 0


if __name__ == "__main__":
    raise SystemExit(main())
