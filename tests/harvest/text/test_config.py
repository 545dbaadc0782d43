"""Which texts are asked for: names, weights, and options for each."""

import pytest

from harvest.text.config import TextConfig
from residscope.errors import UsageError


@pytest.mark.parametrize("word", ["pydoc:x", "owner/name:half", "logs.jsonl:"])
def test_a_weight_that_is_no_number_is_named_as_the_weight(word: str) -> None:
    with pytest.raises(UsageError, match=f"--dataset {word}: the weight after the colon should be a number, found '"):
        TextConfig(dataset=(word,))


def test_a_number_after_the_last_colon_is_a_weight() -> None:
    words = ("pydoc:2", "owner/name", "C:\\logs.txt:0.5", "odd:2:1", "C:\\b.txt")
    choices = TextConfig(dataset=words).choices
    assert [(c.name, c.weight) for c in choices] == [
        ("pydoc", 2),
        ("owner/name", 1),
        ("C:\\logs.txt", 0.5),
        ("odd:2", 1),
        ("C:\\b.txt", 1),
    ]
