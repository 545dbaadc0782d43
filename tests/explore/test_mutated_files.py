"""Each reader on damaged files: one error line with exit code 1, 2 or 3, or a result, and never a traceback.

A few draws in `make test`, always the same; `make explore`, which sets RESIDSCOPE_EXPLORE, draws 10,000 new ones. A
reader goes on after its first failure; all are told at its end, and with `-s` how many draws gave which exit code.
"""

import contextlib
import io
import os
import random
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import analysis.cli
import harvest.cli
import residscope.cli
import train.cli
import train.formats.cli
import train.run
from analysis.report.data import load_results
from analysis.report.page import render_report
from harvest.config import TextConfig
from harvest.lens.translators import TunedLens, load_lens
from harvest.model.load import load_model
from harvest.model.names import resolve_model
from harvest.text.sources import open_sources
from residscope.console import run_command
from residscope.reading import reading
from tests.support.harvesting import tree
from tests.support.models import tiny_model
from tests.support.mutations import mutated
from tests.support.stores import make_store, random_activations
from train.metrics import MetricsFile, read_metrics

SEED = os.environ.get("RESIDSCOPE_EXPLORE")
TRAIN = "--store acts.zarr --n-latents 40 --k 4 --kernels torch --batch-size 64 --checkpoint-every 4"
HARVEST = "--model model --context-length 32 --max-tokens 64 --out new.zarr --overwrite --dataset"

Main = Callable[[list[str]], int]


def report(words: list[str]) -> int:
    """The report's part of `analyze --prompt`."""

    def write() -> None:
        with reading(words[0]):
            render_report(load_results(Path(*words))).encode(errors="replace")

    return run_command("analyze", write)


def lens(words: list[str]) -> int:
    """The lens's part of `harvest --lens`."""

    def load() -> None:
        found: TunedLens = load_lens(*words, model_id="m", n_layers=3, d_model=32)
        found.invert(found.apply(torch.ones(1, 32), 0), 0)

    return run_command("harvest", load)


def model(words: list[str]) -> int:
    """The model's part of `harvest`."""

    def load() -> None:
        load_model(resolve_model(words[0], random_init="--random-init" in words)).tokenizer.text([1, 2, 3])

    return run_command("harvest", load)


def text(words: list[str]) -> int:
    """The text's part of `harvest`."""

    def read() -> None:
        for source in open_sources(TextConfig(dataset=(words[0],))):
            source.check()
            assert all(isinstance(document, str) for document in source.documents())

    return run_command("harvest", read)


def metrics(words: list[str]) -> int:
    """What `train --resume` and its figure do with a run's lines."""

    def read() -> None:
        MetricsFile(Path(words[0]), resume_step=2).close()
        read_metrics(Path(words[0]))

    return run_command("train", read)


READERS: dict[str, tuple[str, Main, str]] = {
    # What is damaged (a file of the folder, or all below one), the command, its words; @ is the folder.
    "info": ("acts.zarr", residscope.cli.main, "info @/acts.zarr"),
    "verify": ("acts.zarr", residscope.cli.main, "verify @/acts.zarr"),
    "checkpoint": ("ckpt.pt", train.formats.cli.main, "@/ckpt.pt @/out --to saelens --overwrite"),
    "resume": ("part.pt", train.cli.main, f"{TRAIN} --out @/part.pt --resume"),
    "finished": ("ckpt.pt", train.cli.main, f"{TRAIN} --out @/ckpt.pt --resume"),
    "metrics": ("part.metrics.jsonl", metrics, "@/part.metrics.jsonl"),
    "resumed metrics": ("part.metrics.jsonl", train.cli.main, f"{TRAIN} --out @/part.pt --resume"),
    "options": ("ckpt.config.toml", train.cli.main, "--config @/ckpt.config.toml --overwrite --dry-run"),
    "export": ("ckpt.safetensors", train.formats.cli.main, "@/ckpt.safetensors @/out --to mlsae --overwrite"),
    "saelens": ("saelens", train.formats.cli.main, "@/saelens @/out --to residscope --overwrite"),
    "mlsae": ("mlsae", train.formats.cli.main, "@/mlsae @/out --to residscope --overwrite"),
    "sparsify": ("sparsify", train.formats.cli.main, "@/sparsify @/out --to residscope --overwrite"),
    "lens": ("lens", lens, "@/lens"),
    "model": ("model", model, "@/model"),
    "model's configuration": ("model/config.json", model, "@/model"),
    "random weights": ("model/config.json", model, "@/model --random-init"),
    "tokenizer's configuration": ("model/tokenizer_config.json", model, "@/model"),
    "harvest": ("model", harvest.cli.main, f"{HARVEST} text.jsonl --dry-run"),
    "jsonl": ("text.jsonl", text, "@/text.jsonl"),
    "gzip": ("text.jsonl.gz", text, "@/text.jsonl.gz"),
    "zstd": ("text.jsonl.zst", text, "@/text.jsonl.zst"),
    "parquet": ("text.parquet", text, "@/text.parquet"),
    "summary": ("analysis/summary.json", analysis.cli.main, "--compare @/analysis --out @/compared"),
    "report": ("analysis", report, "@/analysis"),
}
SLOW = ("harvest", "resumed metrics")
"""Whole commands, a hundred times slower than what reads for them, and so drawn less."""
DRAWS = int(os.environ.get("RESIDSCOPE_DRAWS", 10_000 // len(READERS) + 1)) if SEED else 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that is read, small; the working folder of the tests."""
    import gzip
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    root = tmp_path_factory.mktemp("mutated")
    with contextlib.chdir(root), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        tiny_model("gpt2", root / "model")
        make_store(root / "acts.zarr", random_activations(n_tokens=200))
        assert train.cli.main(f"{TRAIN} --out ckpt.pt".split()) == 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.run, "stop_on_signals", lambda: contextlib.nullcontext(lambda: True))
            assert train.cli.main(f"{TRAIN} --out part.pt".split()) == 130
        extra = '{"step": 1, "vectors": 64, "loss": 1.0, "fvu": 1.0, "l0": 4.0, "dead_fraction": 0.0}\n'
        (root / "part.metrics.jsonl").write_text(extra * 3)
        for to in ("saelens", "mlsae", "sparsify"):
            assert train.formats.cli.main(f"ckpt.pt {to} --to {to}".split()) == 0
        (root / "lens").mkdir()
        (root / "lens/config.json").write_text(
            json.dumps({"num_hidden_layers": 3, "d_model": 32, "bias": True, "base_model_name_or_path": "m"})
        )
        shapes = {"weight": (32, 32), "bias": (32,)}
        translators = {f"{i}.{name}": 0.1 * torch.ones(shape) for i in range(3) for name, shape in shapes.items()}
        torch.save(translators, root / "lens/params.pt")
        lines = "".join(json.dumps({"text": f"text {i} " * 9}) + "\n" for i in range(9))
        (root / "text.txt").write_text("a text " * 40)
        (root / "text.jsonl").write_text(lines)
        (root / "text.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
        (root / "text.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
        pq.write_table(pa.table({"text": ["some text " * 9] * 9}), root / "text.parquet")
        assert analysis.cli.main(["--store", "acts.zarr", "--sae", "ckpt.pt", "--out", "analysis", "--no-report"]) == 0
    return root


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_one_line_and_never_a_traceback(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    codes, failed = Counter[object](), list[str]()
    for draw in range(DRAWS if name not in SLOW else DRAWS // 20 + 1):
        try:
            codes[check(name, folder, draw)] += 1
        except AssertionError as error:
            cause = error.__cause__
            place = traceback.extract_tb(cause.__traceback__)[-1] if cause else None
            failed.append(f"{error}" + (f": {type(cause).__name__} {cause!s:.200} at {place}" if cause else ""))
    print(f"{name}: {dict(sorted(codes.items(), key=str))}, {len(failed)} failed")
    assert not failed, "\n".join(failed)


def check(name: str, folder: Path, draw: int) -> object:
    """One damaged file; gives the exit code."""
    below, main, words = READERS[name]
    rng = random.Random(f"{SEED}:{name}:{draw}")
    found = sorted(path for path in (folder / below).rglob("*") if path.is_file() and path.stat().st_size)
    path = rng.choice(found) if found else folder / below
    before = tree(folder)
    path.write_bytes(mutated(path, rng))
    threads, output, errors = torch.get_num_threads(), io.StringIO(), io.StringIO()
    where = f"draw {draw} of {name}, seed {SEED}: {path.relative_to(folder)}"
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = main(words.replace("@", str(folder)).split())
    except SystemExit as ended:
        code = ended.code
    except BaseException as error:
        if keep := os.environ.get("RESIDSCOPE_KEEP"):
            Path(keep, f"{name}-{draw}-{path.name}").write_bytes(path.read_bytes())
        raise AssertionError(where) from error
    finally:
        torch.set_num_threads(threads)
        _restore(folder, before)
    last = (errors.getvalue().strip().splitlines() or [""])[-1]
    assert code in (0, 1, 2, 3), (where, code)
    assert code == 0 or name == "verify" or ": error: " in last, (where, last)
    assert "Traceback" not in errors.getvalue(), (where, errors.getvalue())
    return code


def _restore(folder: Path, before: dict[str, bytes]) -> None:
    for name, data in tree(folder).items():
        if name not in before:
            (folder / name).unlink()
        elif before[name] != data:
            (folder / name).write_bytes(before[name])
    for name in before.keys() - tree(folder).keys():
        (folder / name).write_bytes(before[name])
