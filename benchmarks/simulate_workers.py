"""How a harvest by many workers would go, and where it would break first: a simulation, seeded, in plain Python.

    python benchmarks/simulate_workers.py [--workers 64] [--shards 61036] [--seeds 5] [--json]

The rules are those of harvest/filling/workers.py: groups of shards (`shard_groups`, the very function) wait in line;
each worker has one; the command hands the next one out, then commits what has come back, a shard at a time, and hands
out nothing while it does; what a killed worker had is lost whole and comes back in single shards, and one that is lost
three times ends the run. Default sizes: 1e9 tokens of pythia-1b in shards of 16,384 tokens.

Each line changes one thing: how long a commit takes, how often workers die, how many are slow, what the storage takes.
Time is over the ideal one, all workers busy without a fault: 1 is best. Exit code 1 where the runs of a seed differ.
"""

import argparse
import heapq
import json
import random
import statistics
import sys
from collections import Counter, deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from harvest.sequences import SequenceBatch, shard_groups
from residscope.cluster import ATTEMPTS


@dataclass(frozen=True, kw_only=True)
class World:
    """What the simulation is told of workers and machines."""

    workers: int = 64
    shards: int = 61_036
    seconds: float = 0.8
    """That a shard takes a usual worker: 16,384 tokens at 20,000 a second."""
    commit: float = 0.005
    """Seconds of the command for a shard: a rename, two syncs, a line of the manifest."""
    hours_to_death: float = float("inf")
    """Mean time until a worker is killed."""
    restart: float = 60.0
    """Until it is replaced and has loaded the model."""
    slow: float = 0.0
    """Share of workers that are slow,"""
    slowness: float = 4.0
    """by so much."""
    storage: float = float("inf")
    """Shards a second that all can write together."""


class Outcome(NamedTuple):
    """How it went."""

    over_ideal: float
    """Time over that of all workers, busy without a fault; infinite where the run was ended by a shard's failures."""
    idle: float
    """Share of the workers' time in which they wait for the command or at the end."""
    lost: float
    """Share of it that is work done again, or restarts."""
    tail: float
    """Share of the whole time after the last group was handed out."""


def simulate(world: World, seed: int) -> Outcome:
    """One run."""
    rng = random.Random(seed)
    # One batch of sequences a shard: groups are then those of any larger batch that ends where a shard does.
    batches = [SequenceBatch(i * 16_384, (i + 1) * 16_384, 2048) for i in range(world.shards)]
    waiting = deque(shard_groups(batches, list(range(world.shards)), 16_384, world.workers))
    pace = [world.slowness if rng.random() < world.slow else 1.0 for _ in range(world.workers)]
    usual = max(world.seconds, world.workers / world.storage)
    running: list[tuple[float, int, list[int], bool]] = []  # when it ends, worker, shards, whether it was killed
    free, failures = list(range(world.workers)), Counter[int]()
    ready_at = [0.0] * world.workers  # of a worker that was killed
    now = busy = lost = handed_out = 0.0

    def hand_out() -> None:
        nonlocal handed_out
        for worker in [w for w in free if ready_at[w] <= now][: len(waiting)]:
            free.remove(worker)
            shards = waiting.popleft()
            handed_out, takes = now, usual * pace[worker] * len(shards)
            dies = rng.expovariate(1 / (3600 * world.hours_to_death)) if world.hours_to_death < float("inf") else takes
            heapq.heappush(running, (now + min(takes, dies), worker, shards, dies < takes))

    while waiting or running:
        hand_out()
        if not running:
            now = min(ready_at[w] for w in free)
            continue
        now = max(now, running[0][0])
        committed = 0
        while running and running[0][0] <= now:  # all that have come back by now
            ended, worker, shards, killed = heapq.heappop(running)
            free.append(worker)
            if killed:
                ready_at[worker] = ended + world.restart
                lost += world.restart + usual * pace[worker] * len(shards) / 2
                failures.update(shards)
                if max(failures[shard] for shard in shards) >= ATTEMPTS:
                    return Outcome(float("inf"), 0.0, 0.0, 0.0)
                waiting.extendleft([shard] for shard in reversed(shards))
            else:
                busy += usual * pace[worker] * len(shards)
                committed += len(shards)
        hand_out()  # before anything is committed
        now += committed * world.commit
    ideal = world.shards * world.seconds / world.workers
    total = now * world.workers
    return Outcome(now / ideal, max(0.0, 1 - (busy + lost) / total), lost / total, (now - handed_out) / now)


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description="A harvest by many workers, simulated.")
    parser.add_argument("--workers", type=int, default=World.workers)
    parser.add_argument("--shards", type=int, default=World.shards)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    options = parser.parse_args()
    usual = World(workers=options.workers, shards=options.shards)
    worlds = {"as it should be": usual}
    worlds |= {f"a commit takes {ms} ms": replace(usual, commit=ms / 1000) for ms in (1, 10, 20, 50)}
    worlds |= {f"a worker dies every {h:g} h": replace(usual, hours_to_death=h) for h in (24, 4, 1, 0.25)}
    worlds |= {f"{s:.0%} of workers 4 times slower": replace(usual, slow=s) for s in (0.02, 0.1, 0.25)}
    worlds |= {f"storage takes {n} shards a second": replace(usual, storage=n) for n in (160, 40, 10)}
    found: dict[str, list[float]] = {}
    print(f"{options.workers} workers, {options.shards:,} shards; medians of {options.seeds} seeds")
    print(f"{'':<40}{'time':>8}{'idle':>8}{'lost':>8}{'tail':>8}  runs ended by failures")
    same = True
    for name, world in worlds.items():
        runs = [simulate(world, seed) for seed in range(options.seeds)]
        same &= simulate(world, 0) == runs[0]
        good = [run for run in runs if run.over_ideal < float("inf")]
        middle = [statistics.median(column) for column in zip(*good, strict=True)] if good else [float("inf"), 0, 0, 0]
        found[name] = middle
        words = f"{name:<40}{middle[0]:>8.2f}" + "".join(f"{share:>8.1%}" for share in middle[1:])
        print(f"{words}  {len(runs) - len(good)} of {len(runs)}", flush=True)
    if options.json:
        print(json.dumps(found))
    return int(not same)


if __name__ == "__main__":
    raise SystemExit(main())
