"""A store's metadata: sizes, layers, number formats and origin, converted to and from the root group's attributes.

How: one frozen dataclass, checked when made; `from_attributes` accepts exactly the attributes that `to_attributes`
writes, and no others. Nothing here touches a disk.

Shapes: T tokens, L stored layers, D = d_model, C tokens in a chunk, S tokens in a shard.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from residscope.console import human_bytes
from residscope.errors import IncompatibleError, UsageError

FORMAT = "residscope-activations"
FORMAT_VERSION = 1
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
CODECS = ("none", "zstd")
ZSTD_LEVEL = 1
ABSENT = -1
"""Offset and length of an omitted chunk in a shard's index: 2^64 - 1, read as a signed number."""

LARGEST_SHARD = 1 << 30
"""Size of the largest shard that is written or read, in bytes before compression."""

_CHUNK_BYTES = 512 * 1024
_SHARD_BYTES = 64 * 1024 * 1024
_CHUNK_BYTES_LIMIT = 2 * _SHARD_BYTES
_SHARD_TOKENS = 512
_MOST_SHARDS = 8192


@dataclass(frozen=True, kw_only=True)
class StoreMeta:
    """The sizes, formats and origin of a store; never changes once the store is made."""

    n_tokens: int
    """Tokens in the store, kept or not; at least 1."""
    layers: tuple[int, ...]
    """The model's blocks whose outputs are stored, ascending; a "stored layer" is an index into this."""
    n_model_layers: int
    """Blocks of the model."""
    d_model: int
    """Size of a residual stream vector."""
    stored_dtype: str = "bfloat16"
    """bfloat16 (on the disk as uint16), float16 or float32."""
    codec: str = "none"
    """none, or zstd (level 1) for each inner chunk."""
    chunk_tokens: int
    """Tokens in an inner chunk (C), which holds one layer."""
    shard_tokens: int
    """Tokens in a shard (S), which holds every stored layer; a multiple of `chunk_tokens`."""
    context_length: int
    """Longest packed sequence, in tokens."""
    lens: dict[str, Any] | None = None
    """Tuned lens that the stored vectors went through (id, hash, indexing), or None."""
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Plain JSON: model, revision, architecture, tokenizer, data set, separator, seed, compute dtype, versions."""
    config_hash: str = ""
    """Hash of everything that the stored bytes depend on (`config_hash`); each manifest line repeats it."""

    def __post_init__(self) -> None:
        for name in ("n_tokens", "n_model_layers", "d_model", "chunk_tokens", "shard_tokens", "context_length"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UsageError(f"store: {name} should be a whole number of at least 1, found {value!r}")
        if not self.layers or any(type(layer) is not int for layer in self.layers):
            raise UsageError(f"store: layers should name at least one block, found {self.layers!r}")
        ascending = list(self.layers) == sorted(set(self.layers))
        if not ascending or self.layers[0] < 0 or self.layers[-1] >= self.n_model_layers:
            wanted = f"ascend within 0..{self.n_model_layers - 1} without repeats"
            raise UsageError(f"store: layers should {wanted}, found {list(self.layers)}")
        if not (isinstance(self.lens, dict | None) and isinstance(self.provenance, dict)):
            raise UsageError("store: lens and provenance should be mappings")
        if self.stored_dtype not in ITEMSIZE:
            raise UsageError(f"store: stored_dtype should be one of {', '.join(ITEMSIZE)}, found {self.stored_dtype!r}")
        if self.codec not in CODECS:
            raise UsageError(f"store: codec should be one of {', '.join(CODECS)}, found {self.codec!r}")
        if self.shard_tokens * self.bytes_per_token > LARGEST_SHARD:
            found = human_bytes(self.shard_tokens * self.bytes_per_token)
            raise UsageError(f"store: a shard should have at most 1.07 GB before compression, found {found}")
        if self.shard_tokens % self.chunk_tokens:
            found = f"shard_tokens ({self.shard_tokens}) should be a multiple of chunk_tokens ({self.chunk_tokens})"
            raise UsageError(f"store: {found}")

    @property
    def n_layers(self) -> int:
        """Stored layers (L)."""
        return len(self.layers)

    @property
    def itemsize(self) -> int:
        """Bytes of one stored number."""
        return ITEMSIZE[self.stored_dtype]

    @property
    def n_shards(self) -> int:
        """Number of shards; the last may be partly full."""
        return -(-self.n_tokens // self.shard_tokens)

    @property
    def n_chunks(self) -> int:
        """Number of token chunks that hold at least one token; the last may be partly full."""
        return -(-self.n_tokens // self.chunk_tokens)

    @property
    def chunks_per_shard(self) -> int:
        """Token chunks in a full shard (S / C)."""
        return self.shard_tokens // self.chunk_tokens

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token at all stored layers, before compression."""
        return self.n_layers * self.d_model * self.itemsize

    def shard_bounds(self, shard: int) -> tuple[int, int]:
        """First token of a shard and one past its last valid token."""
        if not 0 <= shard < self.n_shards:
            raise IndexError(f"shard {shard} is outside 0..{self.n_shards - 1}")
        start = shard * self.shard_tokens
        return start, min(start + self.shard_tokens, self.n_tokens)

    def layer_indices(self, layers: slice | Sequence[int] | None) -> list[int]:
        """The requested stored layers (None: all of them); `IndexError` for one that does not exist."""
        if layers is None or isinstance(layers, slice):
            return list(range(self.n_layers))[layers or slice(None)]
        for layer in layers:
            if not 0 <= layer < self.n_layers:
                raise IndexError(f"stored layer {layer} is outside 0..{self.n_layers - 1}")
        return [int(layer) for layer in layers]

    def to_attributes(self) -> dict[str, Any]:
        """The root group's attributes, as plain JSON."""
        own = {"format": FORMAT, "format_version": FORMAT_VERSION}
        return {**own, **dataclasses.asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> "StoreMeta":
        """The inverse of `to_attributes`; `IncompatibleError` for any other attributes, saying what differs."""
        if attributes.get("format") != FORMAT:
            raise IncompatibleError(
                f"not an activation store: attribute format should be {FORMAT!r}, found {attributes.get('format')!r}; "
                "make one with `harvest`"
            )
        if attributes.get("format_version") != FORMAT_VERSION:
            reason = f"this program reads version {FORMAT_VERSION}; use the version of the program that wrote it"
            raise IncompatibleError(f"the store has format version {attributes.get('format_version')!r}, {reason}")
        names = {field.name for field in dataclasses.fields(cls)}
        found = set(attributes) - {"format", "format_version"}
        if found != names:
            what = f"missing {sorted(names - found)}, unknown {sorted(found - names)}"
            raise IncompatibleError(f"the store's attributes are damaged: {what}")
        values = {name: attributes[name] for name in names}
        if not isinstance(values["layers"], list):
            found = f"layers should be a list, found {values['layers']!r}"
            raise IncompatibleError(f"the store's attributes are damaged: {found}")
        try:
            return cls(**{**values, "layers": tuple(values["layers"])})
        except UsageError as error:
            raise IncompatibleError(f"the store's attributes are damaged: {error}") from None


def config_hash(config: Mapping[str, Any]) -> str:
    """Hash (xxh3-128, hex) of a plain JSON mapping; the order of its keys does not matter."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return xxhash.xxh3_128_hexdigest(text.encode())


def chunk_and_shard_tokens(n_tokens: int, n_layers: int, d_model: int, itemsize: int) -> tuple[int, int]:
    """Tokens in a chunk (C) and in a shard (S) for a store of these sizes.

    C is the largest power of two within 64..512 for which a chunk (one layer) is at most 512 KiB. It is smaller in a
    store with fewer tokens, and if the chunks of all layers would exceed 128 MiB. S is the largest multiple of C for
    which a shard is at most 64 MiB, but larger, up to 1 GiB, so that a shard has at least 512 tokens (its moments take
    8 / S of its data) and a store at most 8,192 shards (each is a file and a line of the manifest).
    """
    chunk = 64
    while chunk < 512 and 2 * chunk * d_model * itemsize <= _CHUNK_BYTES:
        chunk *= 2
    while chunk // 2 >= max(n_tokens, 1):
        chunk //= 2
    token_bytes = n_layers * d_model * itemsize
    while chunk > 1 and chunk * token_bytes > _CHUNK_BYTES_LIMIT:
        chunk //= 2
    n_chunks, chunk_bytes = -(-n_tokens // chunk), chunk * token_bytes
    wanted = max(_SHARD_BYTES // chunk_bytes, _SHARD_TOKENS // chunk, -(-n_chunks // _MOST_SHARDS))
    return chunk, min(max(min(wanted, LARGEST_SHARD // chunk_bytes), 1), n_chunks) * chunk
