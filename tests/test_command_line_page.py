"""docs/command-line.md names every key that a command prints with --json, and no other."""

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import tiny_model

PAGE = Path(__file__).parents[1] / "docs/command-line.md"
SECTIONS = {part.partition("\n")[0]: part for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]}

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line with --json in a folder with a model and a text, and gives what it prints."""
    monkeypatch.chdir(tmp_path)
    tiny_model("gpt2", Path("model"))
    for i in range(8):
        Path(f"{i}.txt").write_text(f"{i} the text of a document, " * 4)

    def run(module: str, line: str, code: int = 0) -> dict[str, Any]:
        assert importlib.import_module(module).main([*line.split(), "--json"]) == code
        (printed,) = capsys.readouterr().out.splitlines()
        return json.loads(printed)

    return run


def named(section: str) -> set[str]:
    return set(re.findall(r"`([a-z0-9_]+)`", SECTIONS[section]))


def keys(found: Any, closed: tuple[str, ...]) -> set[str]:
    """The keys of an object and of those in it, but not of the objects under the names in `closed`."""
    if isinstance(found, list):
        return set().union(*(keys(each, closed) for each in found))
    if not isinstance(found, dict):
        return set()
    inner = (keys(value, closed) for name, value in found.items() if name not in closed)
    return set(found).union(*inner)


def test_every_key_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    harvest = "--model model --dataset *.txt --context-length 32 --max-tokens 600 --out acts.zarr"
    train = "--store acts.zarr --n-latents 64 --k 4 --batch-size 256 --kernels torch --threads 1"
    train += " --validation-fraction 0.3"
    with monkeypatch.context() as patch:
        patch.setattr("harvest.settings.chunk_and_shard_tokens", lambda *sizes: (32, 32))
        run("harvest.cli", f"{harvest.replace('acts', 'rolling')} --rolling 1GB --batch-size 1")
    printed = {
        "harvest --dry-run": [run("harvest.cli", f"{harvest} --dry-run")],
        "harvest": [run("harvest.cli", harvest)],
        "residscope info": [run("residscope.cli", "info acts.zarr")],
        "train --dry-run": [run("train.cli", f"{train} --out a.pt --dry-run")],
        "train": [
            run("train.cli", f"{train} --out a.pt --activation jumprelu"),
            run("train.cli", f"{train} --out b.pt --sweep k=2,3"),
            run("train.cli", f"{train.replace('acts', 'rolling')} --out c.pt".replace("256", "64")),
        ],
        "train compare": [
            run("train.cli", "compare --store acts.zarr --sae a.pt b.k=2.pt --tokens 64 --fit-tokens 64")
        ],
        "residscope convert": [run("residscope.cli", "convert a.pt out --to saelens")],
        "residscope fit-lens": [run("harvest.lens.cli", "--model model --store acts.zarr --method ridge --out lens")],
    }
    printed["residscope plan"] = [run("residscope.cli", "plan --model model --tokens 600 --gpus 2 --n-latents 64")]
    shard = Path("acts.zarr/resid_post/c.0.0.0")
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    printed["residscope verify"] = [
        run("residscope.cli", "verify acts.zarr", code=1),
        run("residscope.cli", "verify acts.zarr --repair"),
    ]
    for section, objects in printed.items():
        found = set().union(*(keys(each, ("provenance", "seconds")) for each in objects))
        words = {"false", "true", "null", section.rpartition(" ")[2]}
        assert found - named(section) == set(), section
        assert named(section) - found - words == set(), section
    assert set(SECTIONS) - set(printed) == {"analyze", "residscope run"}  # the last prints none
