"""Tiny random models of four architectures, saved with a tiny byte-level tokenizer; no network, a few kilobytes each.

Norm weights and biases are random too, so that a vector taken after the final norm cannot pass for one taken before
it.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

ARCHITECTURES = ("gpt_neox", "llama", "gpt2", "gemma")
"""What `tiny_model` can make. The llama and gemma ones have a BOS that opens every sequence; gemma is Gemma 2, with
soft-capped scores."""

D_MODEL = 32
N_LAYERS = {"gpt_neox": 3, "llama": 4, "gpt2": 3, "gemma": 4}
"""Blocks of each."""
CONTEXT = 64
"""Longest context of each."""
EOS = "<|endoftext|>"
BOS = "<|begin|>"
_VOCABULARY = 260


def tiny_tokenizer(*, bos: bool) -> Any:
    """A tokenizer of single bytes (ids 0-255) with EOS (256) and BOS (257), which opens every text if `bos`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: i for i, sign in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([EOS, BOS])
    if bos:
        core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 257)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=EOS, bos_token=BOS if bos else None, pad_token=EOS
    )


def tiny_config(architecture: str) -> Any:
    """The configuration of one of `ARCHITECTURES`."""
    common: dict[str, Any] = {
        "vocab_size": _VOCABULARY,
        "bos_token_id": 257,
        "eos_token_id": 256,
        "pad_token_id": 256,
        "tie_word_embeddings": False,
    }
    if architecture == "gpt2":
        return transformers.GPT2Config(n_embd=D_MODEL, n_layer=3, n_head=4, n_positions=CONTEXT, **common)
    common |= {
        "hidden_size": D_MODEL,
        "intermediate_size": 64,
        "num_hidden_layers": N_LAYERS[architecture],
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
    }
    if architecture == "gpt_neox":
        return transformers.GPTNeoXConfig(**common)
    if architecture == "llama":
        return transformers.LlamaConfig(num_key_value_heads=2, **common)
    if architecture == "gemma":
        return transformers.Gemma2Config(num_key_value_heads=2, head_dim=8, sliding_window=16, **common)
    raise ValueError(f"no tiny model of {architecture!r}")


def tiny_model(architecture: str, folder: Path, *, seed: int = 0) -> Path:
    """Save a tiny random model and its tokenizer into `folder`, unless they are there; gives the folder."""
    if (folder / "tokenizer_config.json").exists():
        return folder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(architecture))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.copy_(torch.randn_like(parameter) * 0.3 + ("bias" not in name))
                else:
                    parameter.mul_(8)
    model.save_pretrained(folder)
    tiny_tokenizer(bos=architecture in ("llama", "gemma")).save_pretrained(folder)
    return folder
