"""Options: what they refuse, how layers are read, and that what is saved reads back."""

from pathlib import Path
from typing import Any

import pytest

from harvest.config import HarvestConfig, parse_layers
from residscope.errors import UsageError
from residscope.options import parse_options
from tests.support.harvesting import harvest_config


@pytest.mark.parametrize(
    ("words", "layers"),
    [
        ((), None),
        (("0-5,11",), (0, 1, 2, 3, 4, 5, 11)),
        (("3",), (3,)),
        (("2", "0", "2-3"), (0, 2, 3)),
        (("4-4", " 1"), (1, 4)),
    ],
)
def test_layers_are_read(words: tuple[str, ...], layers: tuple[int, ...] | None) -> None:
    assert parse_layers(words) == layers


@pytest.mark.parametrize("word", ["", "a", "3-1", "-1", "1-", "1--2", "0,,1", "1.5", "all"])
def test_words_that_are_no_layers_are_refused(word: str) -> None:
    with pytest.raises(UsageError, match="0-5,11"):
        parse_layers((word,))


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 0},
        {"context_length": 0},
        {"context_length": 1},
        {"batch_size": -1},
        {"model": " "},
        {"layers": ("x",)},
        {"dataset": ("",)},
        {"dataset": ("pydoc:0",)},
        {"dataset": ("pydoc:-1", "stdlib")},
        {"dataset": ("pydoc:nan", "stdlib")},
        {"dataset": ("pydoc", "pydoc:2")},
        {"dataset": ("pydoc", "stdlib", "a.txt"), "text_column": ("a", "b")},
        {"pack": False, "document_separator": "x"},
        {"shuffle_documents": -1},
        {"seed": -1},
        {"n_workers": 0},
        {"scheduler": "processes"},
        {"seed": 2**63},
        {"layers": ("0-99999999999",)},
    ],
)
def test_values_that_cannot_work_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        harvest_config(**change)


def test_flags_reach_the_configuration() -> None:
    words = "--model gpt2 --out a.zarr --layers 0-2 5 --no-keep-first-position --document-separator ¶ --dry-run --json"
    config = parse_options(HarvestConfig, words.split(), prog="harvest", description="")
    assert config == harvest_config(layers=("0-2", "5"), document_separator="¶", dry_run=True, json=True)


def test_a_file_may_use_tables(tmp_path: Path) -> None:
    flat = 'model = "gpt2"\nout = "a.zarr"\ndataset = "pydoc"\nlayers = ["0-2"]\nseed = 3\n'
    tables = 'out = "a.zarr"\n[weights]\nmodel = "gpt2"\n[text]\ndataset = "pydoc"\n[storage]\nlayers = "0-2"\n'
    for i, text in enumerate((flat, tables + "[control]\nseed = 3\n")):
        (tmp_path / f"{i}.toml").write_text(text)
        words = ["--config", str(tmp_path / f"{i}.toml")]
        config = parse_options(HarvestConfig, words, prog="harvest", description="")
        assert config == harvest_config(dataset="pydoc", layers=("0-2",), seed=3)
