"""From a HarvestConfig to everything that a run depends on, with no "auto" left, and the record of it that the store
keeps.

How: the record is plain JSON; it holds what the stored bytes depend on and nothing else (no paths, no times, no
device), so that the same command gives the same record anywhere, and a store can say which field of another run's
record differs. What it does not do: load weights or read text.
"""

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harvest.config import HarvestConfig, parse_layers
from harvest.lens.translators import TunedLens, load_lens
from harvest.model import load as models
from harvest.model.load import ModelSpec
from harvest.table import Packing, make_packing
from harvest.text.sources import TextSource
from residscope.errors import IncompatibleError, UsageError
from store.meta import ITEMSIZE

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_CONTEXT = 2048
_BATCH_BYTES = 256 * 1024 * 1024
_BATCH_TOKENS = 8192
# A block's inputs and outputs then stay in the cache: a sixth faster than 8192 tokens (benchmarks/bench_harvest.py).
_BATCH_TOKENS_ON_CPU = 1024
# Options that came after the first stores: a record without one was made as if by this value.
_VALUES_BEFORE = {"dataset_weights": None, "shuffle_documents": None, "pack": True}
_NAMES_OF = {"model_fingerprint": "model", "lens_hash": "lens"}
"""Content hashes of what is local, and the fields with its name, which is that of its folder or file."""
_PACKAGES = ("residscope", "torch", "transformers", "tokenizers", "datasets", "zarr", "numpy")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A run's settings, all resolved."""

    spec: ModelSpec
    """Which model."""
    tokenizer: Any
    """Its tokenizer."""
    packing: Packing
    """How sequences are made."""
    n_model_layers: int
    """Blocks of the model."""
    layers: tuple[int, ...]
    """Blocks to store."""
    d_model: int
    """Size of a residual stream vector."""
    vocabulary: int
    """Rows of the model's embedding."""
    batch_size: int
    """Sequences in a forward pass."""
    dtype: str
    """Compute dtype."""
    store_dtype: str
    """Stored dtype."""
    device: torch.device
    """Where to compute."""
    lens: TunedLens | None
    """Lens to apply, on the device."""
    notes: tuple[str, ...]
    """What the user should be told once."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token at all stored layers."""
        return len(self.layers) * self.d_model * ITEMSIZE[self.store_dtype]

    @property
    def batch_tokens(self) -> int:
        """Most tokens in a forward pass."""
        return self.batch_size * self.packing.context_length


def resolve(config: HarvestConfig) -> Settings:
    """Resolve names, defaults and "auto". Raises as `resolve_model`, `load_lens` and `make_packing` do, and
    `UsageError` for what the model cannot do."""
    wanted = parse_layers(config.layers)
    device = _device(config.device)
    spec = models.resolve_model(
        config.model, revision=config.revision, random_init=config.random_init, seed=config.seed
    )
    model_config = models.load_config(spec)
    n_layers, d_model = models.n_layers_of(model_config), models.d_model_of(model_config)
    if n_layers < 1:
        raise IncompatibleError(f"{spec.name}: its configuration says that it has {n_layers} blocks")
    layers = tuple(range(n_layers)) if wanted is None else wanted
    if layers[-1] >= n_layers:
        raise UsageError(f"--layers: {spec.name} has layers 0 to {n_layers - 1}, found {layers[-1]}")
    context = _context(config, spec, models.longest_context(model_config))
    tokenizer = models.load_tokenizer(spec)
    packing = make_packing(
        tokenizer,
        context_length=context,
        separator=config.document_separator,
        keep_first_position=config.keep_first_position,
        packed=config.pack,
    )
    dtype, notes = _dtype(config.dtype, device)
    lens = None
    if config.lens is not None:
        lens = load_lens(
            config.lens, model_id=spec.name, n_layers=n_layers, d_model=d_model, indexing=config.lens_indexing
        ).to(device)
        if (
            lens.base_model is not None
            and lens.base_model.rpartition("/")[2].lower() != spec.name.rpartition("/")[2].lower()
        ):
            notes = (
                *notes,
                f"warning: the lens {lens.name} was fitted for {lens.base_model}, the model is {spec.name}",
            )
    itemsize = ITEMSIZE[config.store_dtype]
    return Settings(
        spec=spec,
        tokenizer=tokenizer,
        packing=packing,
        n_model_layers=n_layers,
        layers=layers,
        d_model=d_model,
        vocabulary=int(model_config.get_text_config().vocab_size),
        batch_size=config.batch_size or default_batch_size(context, len(layers) * d_model * itemsize, device.type),
        dtype=dtype,
        store_dtype=config.store_dtype,
        device=device,
        lens=lens,
        notes=notes,
    )


def default_batch_size(context_length: int, bytes_per_token: int, device_type: str) -> int:
    """Sequences in a forward pass, at least one: as many as 256 MiB of stored vectors and 8192 tokens hold, or 1024
    tokens on a CPU."""
    tokens = _BATCH_TOKENS_ON_CPU if device_type == "cpu" else _BATCH_TOKENS
    return max(min(_BATCH_BYTES // (context_length * bytes_per_token), tokens // context_length), 1)


def require_in_vocabulary(settings: Settings, token_id: np.ndarray) -> None:
    """`IncompatibleError` where the model's embedding has no row for one of some token ids."""
    if int(token_id.max()) >= settings.vocabulary:
        raise IncompatibleError(
            f"{settings.spec.name}: the tokenizer gives token {int(token_id.max())}, the model's embedding has"
            f" {settings.vocabulary} rows; the tokenizer is another model's"
        )


def make_record(config: HarvestConfig, settings: Settings, sources: Sequence[TextSource]) -> dict[str, Any]:
    """What the stored bytes depend on, as plain JSON by option; two runs may share a store when these are equal."""
    spec, lens = settings.spec, settings.lens
    choices = [source.choice for source in sources]
    return {
        "model": spec.name,
        "model_revision": spec.revision,
        "model_fingerprint": spec.fingerprint,
        "random_init": config.random_init,
        "seed": config.seed,
        "dataset": _for_each([source.dataset for source in sources]),
        "dataset_weights": [choice.weight for choice in choices] if len(choices) > 1 else None,
        "dataset_config": _for_each([choice.config or None for choice in choices]),
        # Of a hub data set only what was asked for: continuing a store reads no text, so that it must not ask the hub.
        "dataset_revision": _for_each([s.revision if s.is_local else s.choice.revision or None for s in sources]),
        "split": _for_each([choice.split for choice in choices]),
        "text_column": _for_each([choice.column for choice in choices]),
        "shuffle_documents": config.shuffle_documents,
        "pack": config.pack,
        "max_tokens": config.max_tokens,
        "context_length": settings.packing.context_length,
        "batch_size": settings.batch_size,
        "layers": list(settings.layers),
        "dtype": settings.dtype,
        "store_dtype": settings.store_dtype,
        "codec": config.codec,
        "document_separator": settings.packing.separator,
        "keep_first_position": config.keep_first_position,
        "lens": lens.name if lens else None,
        "lens_hash": lens.fingerprint if lens else None,
        "lens_indexing": lens.indexing if lens else None,
    }


def _for_each(values: list[Any]) -> Any:
    """One text's value as it is, several texts' as a list."""
    return values[0] if len(values) == 1 else values


def refuse_differences(out: Path, stored: Mapping[str, Any] | None, record: Mapping[str, Any]) -> list[str]:
    """`IncompatibleError` that names every field in which a store's record differs from this run's. An option that came
    after the store counts as its value before. A model or lens that has another name now and the same content hash is
    the same: gives a line for the user of each."""
    if stored is None:
        raise IncompatibleError(
            f"{out} was not made by harvest; choose another --out, or give --overwrite to start anew"
        )
    stored = {**_VALUES_BEFORE, **stored}
    names = [name for name in {**record, **stored} if stored.get(name) != record.get(name)]
    renamed = [
        name
        for content, name in _NAMES_OF.items()
        if name in names and stored.get(content) is not None and stored.get(content) == record.get(content)
    ]
    names = [name for name in names if name not in renamed]
    if names:
        found = "; ".join(
            f"{name} is {_shown(stored.get(name))} there and {_shown(record.get(name))} here" for name in names
        )
        if "model_fingerprint" in names and "model" not in names:
            found += " (a hash of the model's configuration, tokenizer and weights: one of these files was changed)"
        raise IncompatibleError(
            f"{out} was made with other options: {found}. Give the same options to continue it, another --out, or"
            " --overwrite to start anew"
        )
    return [
        f"the {name} {record[name]!r} is what {out} has as {stored[name]!r}: the contents have the same hash; the store"
        " keeps that name"
        for name in renamed
    ]


def make_provenance(
    settings: Settings,
    sources: Sequence[TextSource],
    taken: Sequence[tuple[int, int]],
    record: Mapping[str, Any],
    architecture: str,
) -> dict[str, Any]:
    """Where a store comes from, as plain JSON. taken: documents and tokens of each source that are in it."""
    spec, packing = settings.spec, settings.packing
    return {
        "model": spec.name,
        "model_source": spec.source,
        "model_revision": spec.revision,
        "model_fingerprint": spec.fingerprint,
        "architecture": architecture,
        "random_init": spec.random_init,
        "seed": spec.seed,
        "tokenizer": type(settings.tokenizer).__name__,
        "bos_id": packing.bos_id,
        "separator": packing.separator,
        "separator_ids": list(packing.separator_ids),
        "dataset": " ".join(_named(source, len(sources)) for source in sources),
        "dataset_revision": _for_each([source.revision for source in sources]),
        "sources": [
            {
                "dataset": source.dataset,
                "revision": source.revision,
                "weight": source.choice.weight,
                "documents": documents,
                "tokens": tokens,
            }
            for source, (documents, tokens) in zip(sources, taken, strict=True)
        ],
        "split": record["split"],
        "compute_dtype": settings.dtype,
        "device": settings.device.type,
        "versions": versions(),
        "config": dict(record),
    }


def _named(source: TextSource, n_sources: int) -> str:
    return f"{source.dataset}:{source.choice.weight:g}" if n_sources > 1 else source.dataset


def versions() -> dict[str, str]:
    """Versions of Python, of this program and of the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _context(config: HarvestConfig, spec: ModelSpec, longest: int | None) -> int:
    if config.context_length is None:
        return min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    if longest is not None and config.context_length > longest:
        raise UsageError(f"--context-length {config.context_length}: {spec.name} takes at most {longest} tokens")
    return config.context_length


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # The meta device has no numbers.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"--device {name}: not to be had here ({str(error).splitlines()[0]}); try --device cpu"
        ) from None
    return device


def _dtype(name: str, device: torch.device) -> tuple[str, tuple[str, ...]]:
    """The compute dtype, and what to tell the user about it."""
    if device.type == "cuda":
        return ("bfloat16" if torch.cuda.is_bf16_supported() else "float32") if name == "auto" else name, ()
    flags = _cpu_flags() if device.type == "cpu" else ""
    if name == "auto":
        faster = (
            "this CPU has AMX: --dtype bfloat16 is several times faster, at about 1 % relative error in the last layer"
        )
        return "float32", (faster,) if "amx_bf16" in flags else ()
    if name == "bfloat16" and "sse2" in flags and not ("amx_bf16" in flags or "avx512_bf16" in flags):
        return name, ("this CPU has no bfloat16 arithmetic: --dtype float32 is several times faster here",)
    return name, ()


def _cpu_flags() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
