"""Two names that differ only behind a dot have files of their own."""

from pathlib import Path

import pytest

from residscope.names import beside, stem


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/acts.zarr", "acts"),
        ("a/ckpt.pt", "ckpt"),
        ("a/ckpt.safetensors", "ckpt"),
        ("a/sweep.lr=0.5.pt", "sweep.lr=0.5"),
        ("a/llama-0.5b", "llama-0.5b"),
        ("a/llama-0.5b.pt", "llama-0.5b"),
        ("a/plain", "plain"),
        ("a/.pt", ".pt"),
    ],
)
def test_only_the_ending_that_says_what_a_thing_is_is_replaced(name: str, expected: str) -> None:
    assert stem(Path(name)) == expected
    assert beside(Path(name), ".loss.png") == Path("a") / f"{expected}.loss.png"
