"""kill -9 at any moment: the same command again gives the store of an uninterrupted run, byte for byte."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.harvesting import ModelFolder

# One interpreter loads the libraries, by a first run, and forks a child for each other run: loading takes longer.
SCRIPT = """
import os, random, signal, sys
from pathlib import Path
import torch
from harvest import run, settings
from harvest.config import HarvestConfig
from residscope.options import from_flat

model, dataset, folder, rounds = sys.argv[1:]
torch.set_num_threads(1)
settings.chunk_and_shard_tokens = lambda *sizes: (32, 64)
sys.stderr = open(os.devnull, "w")


def harvest(out):
    flags = {"model": model, "out": Path(out), "dataset": dataset, "context_length": 20, "batch_size": 1}
    run.harvest(from_flat(HarvestConfig, flags))


writes, last = 0, 0


def count(event, arguments):
    global writes
    if event in ("open", "os.rename") and str(arguments[0]).startswith(folder + "/"):
        writes += 1
        if writes == last:
            os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(count)


def start(out, at=0):
    global writes, last
    pid = os.fork()
    if pid == 0:
        code, writes, last = 1, 0, at
        try:
            harvest(out)
            code = 0
        finally:
            os._exit(code)
    return pid


def tree(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in Path(out).rglob("*") if p.is_file()}


harvest(folder + "/whole")
expected = tree(folder + "/whole")
writes = 0
harvest(folder + "/again")
total = writes
assert tree(folder + "/again") == expected
draw = random.Random(0)
killed = 0
for i in range(int(rounds)):
    out = f"{folder}/killed{i}"
    while True:
        if os.waitpid(start(out, draw.randint(1, total)), 0)[1] == 0:
            break
        killed += 1
        if draw.random() < 0.5:
            assert os.waitpid(start(out), 0)[1] == 0
            break
    assert tree(out) == expected, (i, sorted(set(tree(out)) ^ set(expected)))
print("killed", killed)
"""


@pytest.mark.slow
def test_a_killed_harvest_resumes_to_the_same_bytes(
    model_folder: ModelFolder, text_folder: Path, tmp_path: Path
) -> None:
    arguments = [str(model_folder("gpt2")), str(text_folder), str(tmp_path), "3"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=Path(__file__).parents[2],
        env={"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= 3
