"""Options of `harvest` and `fit-lens` for the text to read: names of data sets or files, and their weights."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from residscope.errors import UsageError

DEFAULT_SPLIT = "train"
DEFAULT_COLUMN = "text"


class TextChoice(NamedTuple):
    """One text with its own options; "" means the default."""

    name: str
    """The name as given, without the weight."""
    weight: float
    """Its share of the tokens, relative to the other texts' weights."""
    config: str
    split: str
    column: str
    revision: str
    token_column: str


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Which text."""

    dataset: tuple[str, ...] = ("monology/pile-uncopyrighted",)
    """One text or several: a hub data set (streamed), a local .txt, .jsonl (.gz, .zst) or .parquet file, a folder or
    "glob*" of such files, pydoc (Python's documentation) or stdlib (its library's source), both offline. NAME:WEIGHT
    sets a text's share of the tokens (pydoc:2 logs.jsonl:1); by default all shares are equal. A .txt file is one
    document."""
    dataset_config: tuple[str, ...] = ()
    """Configuration (subset) of a hub data set that has several. For this and the next three: one value for all texts,
    or one for each, with "" for the default."""
    dataset_revision: tuple[str, ...] = ()
    """Branch, tag or commit of a hub data set; default its newest."""
    split: tuple[str, ...] = (DEFAULT_SPLIT,)
    """Split of a hub data set; local files have none."""
    text_column: tuple[str, ...] = (DEFAULT_COLUMN,)
    """Column that holds the text."""
    token_column: tuple[str, ...] = ()
    """Column that holds this model's token ids (lists of integers) instead of text; they are used as they are.
    One column for all texts, or one for each, with "" for those that are text."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or isinstance(value, str):  # A single text may be given without a tuple.
                object.__setattr__(self, field.name, () if value is None else (value,))
        _ = self.choices  # Raises if the options are invalid.

    @property
    def choices(self) -> tuple[TextChoice, ...]:
        """The requested texts. `UsageError` for an invalid weight or a wrong number of options."""
        if not self.dataset:
            raise UsageError("--dataset is empty")
        columns = [
            self._for_each("dataset_config"),
            self._for_each("split", DEFAULT_SPLIT),
            self._for_each("text_column", DEFAULT_COLUMN),
            self._for_each("dataset_revision"),
            self._for_each("token_column"),
        ]
        found: list[TextChoice] = []
        for word, *own in zip(self.dataset, *columns, strict=True):
            choice = TextChoice(*_name_and_weight(word), *own)
            if choice.token_column and choice.column != DEFAULT_COLUMN:
                raise UsageError(f"--text-column {choice.column}: {choice.name} has a --token-column; give only one")
            if any(choice == other._replace(weight=choice.weight) for other in found):
                raise UsageError(f"--dataset: {choice.name} is given twice; give it once, with a larger weight")
            found.append(choice)
        return tuple(found)

    def _for_each(self, option: str, default: str = "") -> list[str]:
        n, values = len(self.dataset), getattr(self, option)
        if len(values) not in ((1, n) if default else (0, 1, n)):
            wanted = f"be one for all texts or one for each of the {n} of --dataset"
            raise UsageError(f"--{option.replace('_', '-')} should {wanted}, found {len(values)}")
        if len(values) != n:
            values = [*values, ""][:1] * n
        return [value.strip() or default for value in values]


def _name_and_weight(word: str) -> tuple[str, float]:
    """The weight is the number after the last colon; a file whose own name ends like that needs a further weight."""
    name, _, number = word.strip().rpartition(":")
    try:
        weight = float(number) if name else 1.0
    except ValueError:
        # A path may have a colon in it; no other name has.
        if not any(sign in number for sign in "/\\*?[") and not Path(word.strip()).expanduser().exists():
            found = f"the weight after the colon should be a number, found {number!r}"
            raise UsageError(f"--dataset {word}: {found}") from None
        name, weight = "", 1.0
    if not 0 < weight < math.inf:
        raise UsageError(f"--dataset {word}: a weight should be a number above 0, found {number}")
    if not (name or word.strip()):
        raise UsageError("--dataset is empty")
    return name or word.strip(), weight
