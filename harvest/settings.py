"""Turns a HarvestConfig into settings with every "auto" and default resolved. Loads no weights and reads no text."""

import contextlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harvest.config import HarvestConfig, StorageConfig, parse_layers
from harvest.lens.translators import TunedLens, load_lens
from harvest.model.blocks import d_model_of, longest_context, n_layers_of
from harvest.model.load import LoadedModel, load_config, load_model, load_tokenizer
from harvest.model.names import ModelSpec, resolve_model
from harvest.model.tokenizer import Tokenizer
from harvest.text.packing import Packing, make_packing
from residscope.console import parse_bytes
from residscope.errors import IncompatibleError, ResidscopeError, UsageError, said
from store.meta import ITEMSIZE, chunk_and_shard_tokens

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_CONTEXT = 2048
_ROLLING_BATCHES = 64  # that fit in a rolling store's size, so that parts of whole batches mix well
_BATCH_BYTES = 256 * 1024 * 1024
_BATCH_TOKENS = 8192
# A block's inputs and outputs then fit in the cache: a sixth faster than 8192 tokens (benchmarks/bench_harvest.py).
_BATCH_TOKENS_ON_CPU = 1024


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a harvest depends on besides its text."""

    spec: ModelSpec
    tokenizer: Tokenizer
    packing: Packing
    """How sequences are made."""
    n_model_layers: int
    layers: tuple[int, ...]
    """Blocks to store."""
    d_model: int
    vocabulary: int
    """Rows of the model's embedding."""
    batch_size: int
    """Sequences in a forward pass."""
    dtype: str
    """Number format of the computation."""
    store_dtype: str
    device: torch.device
    spread: bool
    """Whether the model is spread over other devices too; its first block is on this one."""
    lens: TunedLens | None
    """Lens to apply, on the device."""
    notes: tuple[str, ...]
    """What the user should be told once."""

    @property
    def known_ids(self) -> np.ndarray:
        """Which ids both the tokenizer and the model have, bool [rows of the embedding]."""
        return np.isin(np.arange(self.vocabulary), list(self.tokenizer.ids))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token at all stored layers."""
        return len(self.layers) * self.d_model * ITEMSIZE[self.store_dtype]

    def chunk_and_shard(self, n_tokens: int) -> tuple[int, int]:
        """Tokens of a chunk, and maximum tokens of a shard, for a store of `n_tokens`."""
        return chunk_and_shard_tokens(n_tokens, len(self.layers), self.d_model, ITEMSIZE[self.store_dtype])


def resolve(config: HarvestConfig) -> Settings:
    """Resolve names, defaults and "auto". Raises like what it calls, and `UsageError` for what the model cannot do."""
    wanted = parse_layers(config.storage.layers)
    spread, device = config.device_map is not None, _device(config.weights.device)
    spec = resolve_model(
        config.weights.model,
        revision=config.weights.revision,
        random_init=config.control.random_init,
        seed=config.control.seed,
    )
    if spread:
        _require_spreadable(spec, device)
    model_config = load_config(spec)
    n_layers, d_model = n_layers_of(model_config), d_model_of(model_config)
    if n_layers < 1:
        raise IncompatibleError(f"{spec.name}: num_hidden_layers should be at least 1, its config.json has {n_layers}")
    layers = tuple(range(n_layers)) if wanted is None else wanted
    if layers[-1] >= n_layers:
        raise UsageError(f"--layers: {spec.name} has layers 0 to {n_layers - 1}, found {layers[-1]}")
    context = context_length(model_config, config.sequences.context_length, spec.name)
    tokenizer = load_tokenizer(spec)
    dtype, dtype_note = _dtype(config.weights.dtype, device)
    lens, lens_note = _lens(config.storage, spec, n_layers, d_model, device)
    store_dtype = config.storage.store_dtype
    token_bytes = len(layers) * d_model * ITEMSIZE[store_dtype]
    return Settings(
        spec=spec,
        tokenizer=tokenizer,
        packing=make_packing(
            tokenizer,
            context_length=context,
            separator=config.sequences.document_separator,
            keep_first_position=config.sequences.keep_first_position,
            packed=config.documents.pack,
        ),
        n_model_layers=n_layers,
        layers=layers,
        d_model=d_model,
        vocabulary=int(model_config.get_text_config().vocab_size),
        batch_size=config.batch_size or default_batch_size(context, token_bytes, device.type, config.storage.rolling),
        dtype=dtype,
        store_dtype=store_dtype,
        device=device,
        spread=spread,
        lens=lens,
        notes=tuple(note for note in (dtype_note, lens_note) if note),
    )


def default_batch_size(context_length: int, bytes_per_token: int, device_type: str, rolling: str | None = None) -> int:
    """Sequences in a pass, at least one: as many as fit in 256 MiB of stored vectors and 8192 tokens (1024 on a CPU).
    In a store of the size `rolling`, a power of two of which the size holds at least 64 batches."""
    tokens = _BATCH_TOKENS_ON_CPU if device_type == "cpu" else _BATCH_TOKENS
    most = min(_BATCH_BYTES, (parse_bytes(rolling) or 0) // _ROLLING_BATCHES) if rolling else _BATCH_BYTES
    size = max(min(most // (context_length * bytes_per_token), tokens // context_length), 1)
    return 1 << size.bit_length() - 1 if rolling else size


def require_in_vocabulary(settings: Settings, token_id: np.ndarray) -> None:
    """`IncompatibleError` if the model's embedding has no row for one of the token ids."""
    if int(token_id.max()) >= settings.vocabulary:
        what = f"but the model's embedding has {settings.vocabulary} rows: it is not this model's tokenizer"
        raise IncompatibleError(f"{settings.spec.name}: the tokenizer produces token {int(token_id.max())}, {what}")


def load_weights(settings: Settings) -> LoadedModel:
    where = {"dtype": TORCH_DTYPES[settings.dtype], "device": settings.device, "spread": settings.spread}
    return load_model(settings.spec, **where, tokenizer=settings.tokenizer)


def context_length(config: Any, asked: int | None, name: str) -> int:
    """Tokens of a sequence; `UsageError` if that is more than the model called `name` takes."""
    longest = longest_context(config)
    context = asked or min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    if longest is not None and context > longest:
        raise UsageError(f"--context-length {context}: {name} takes at most {longest} tokens")
    return context


def _require_spreadable(spec: ModelSpec, device: torch.device) -> None:
    """`UsageError` for what accelerate cannot spread."""
    if importlib.util.find_spec("accelerate") is None:
        raise ResidscopeError("--device-map needs accelerate: pip install accelerate")
    if device.index or (device.type != "cuda" and torch.cuda.is_available()):
        raise UsageError(f"--device-map takes all GPUs: leave --device {device} out")
    if spec.random_init or spec.adapter:
        what = "random weights" if spec.random_init else "an adapter: merge it into the weights first"
        raise UsageError(f"--device-map takes weights as they are in files, not {what}")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # Fails on the meta device, too.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name} is not available ({said(error)}); try --device cpu") from None
    return device


def _dtype(name: str, device: torch.device) -> tuple[str, str | None]:
    """The compute dtype, and what to tell the user about it."""
    if device.type == "cuda":
        return ("bfloat16" if torch.cuda.is_bf16_supported() else "float32") if name == "auto" else name, None
    flags = ""
    with contextlib.suppress(OSError):  # Only Linux has the file.
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if device.type == "cpu" else ""
    note = None
    if name == "auto" and "amx_bf16" in flags:
        note = "this CPU has AMX: --dtype bfloat16 is several times faster, with about 1 % error in the last layer"
    if name == "bfloat16" and "sse2" in flags and not ("amx_bf16" in flags or "avx512_bf16" in flags):
        note = "this CPU has no bfloat16 arithmetic: --dtype float32 is several times faster here"
    return "float32" if name == "auto" else name, note


def _lens(
    config: StorageConfig, spec: ModelSpec, n_layers: int, d_model: int, device: torch.device
) -> tuple[TunedLens | None, str | None]:
    """The lens on the device, and a warning if it says that it was fitted for another model."""
    if config.lens is None:
        return None, None
    sizes = {"n_layers": n_layers, "d_model": d_model}
    lens = load_lens(config.lens, model_id=spec.name, indexing=config.lens_indexing, **sizes).to(device)
    fitted_for = lens.base_model
    if fitted_for is None or fitted_for.rpartition("/")[2].lower() == spec.name.rpartition("/")[2].lower():
        return lens, None
    return lens, f"warning: the lens {lens.name} was fitted for {fitted_for}, the model is {spec.name}"
