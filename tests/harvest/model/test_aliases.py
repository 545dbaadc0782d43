"""Short names."""

import pytest

from harvest.model.aliases import PACKAGED, hub_id, suggestions


@pytest.mark.parametrize(
    ("name", "repo"),
    [
        ("pythia-1b", "EleutherAI/pythia-1b"),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped"),
        ("Pythia-1.4B-deduped", "EleutherAI/pythia-1.4b-deduped"),
        ("gpt2", "openai-community/gpt2"),
        ("gpt2-xl", "openai-community/gpt2-xl"),
        ("smollm2-1.7b-instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct"),
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("gemma-3-1b", "google/gemma-3-1b-pt"),
        ("gemma3-270m", "google/gemma-3-270m"),
        ("gemma2-2b-it", "google/gemma-2-2b-it"),
        ("gemma-7b", "google/gemma-7b"),
        ("llama-3.2-3b", "meta-llama/Llama-3.2-3B"),
        ("llama-3-8b-instruct", "meta-llama/Meta-Llama-3-8B-Instruct"),
        ("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B"),
        ("qwen3-0.6b-base", "Qwen/Qwen3-0.6B-Base"),
        ("no-such-model", None),
    ],
)
def test_short_names(name: str, repo: str | None) -> None:
    assert hub_id(name) == repo


def test_every_packaged_model_is_on_the_hub_too() -> None:
    assert all(hub_id(name) for name in PACKAGED)


def test_a_mistyped_name_is_recognised() -> None:
    assert "pythia-1b" in suggestions("phytia-1b")
