"""What `residscope plan` foretells of this machine, against what then happens: the stages of the demo.

    python benchmarks/bench_plan.py [--tokens 30208] [--json]

The plan is made before and after the stages, since other work on the machine changes both; the mean counts. Seconds
foretold over seconds taken, of whole commands; 1 is best. Exit code 1 where one is beyond a factor of 1.5.
"""
# ruff: noqa: E402  (the path comes first)

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from residscope.commands.demo import CONTEXT_LENGTH, DemoConfig, stages

FACTOR = 1.5


def foretold(tokens: int) -> dict[str, float]:
    """Seconds of each stage."""
    words = f"plan --model smollm2-135m --tokens {tokens} --context-length {CONTEXT_LENGTH} --json".split()
    found = json.loads(run(*words))
    return {**{stage: found["ways"]["stored"][stage] for stage in ("harvest", "train")}, "analyze": found["analyze"]}


def run(*words: str) -> str:
    """A command's stdout."""
    command = [sys.executable, "-m", "residscope", *words]
    return subprocess.run(
        command, check=True, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ).stdout


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description="Stages of the demo, foretold and taken.")
    parser.add_argument("--tokens", type=int, default=DemoConfig.tokens)
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    options = parser.parse_args()
    plans, taken = [foretold(options.tokens)], {}
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as folder:
        for stage, words in stages(DemoConfig(out=Path(folder), tokens=options.tokens)).items():
            began = time.perf_counter()
            run(stage, *words)
            taken[stage] = time.perf_counter() - began
    plans.append(foretold(options.tokens))
    ratios = {stage: sum(plan[stage] for plan in plans) / len(plans) / taken[stage] for stage in taken}
    for stage, ratio in ratios.items():
        said = " and ".join(f"{plan[stage]:.0f}" for plan in plans)
        print(f"{stage:<8} foretold {said} s, took {taken[stage]:.0f} s: {ratio:.2f}")
    if options.json:
        print(json.dumps(ratios))
    return int(any(not 1 / FACTOR <= ratio <= FACTOR for ratio in ratios.values()))


if __name__ == "__main__":
    raise SystemExit(main())
