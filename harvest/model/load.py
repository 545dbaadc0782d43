"""A causal language model by name: its configuration, tokenizer, weights and transformer blocks.

How: `resolve_model` turns a name (short name, hub id, local folder, GGUF file) into a `ModelSpec`, which pins the
exact weights by commit or by content hash and is cheap; `load_config`, `load_tokenizer` and `load_model` then load
what is needed. The blocks are found by a rule, not by a list of architectures: the unique shallowest ModuleList that
is as long as the configuration says there are layers. What it does not do: run code that comes with a model
(`trust_remote_code`), encoder-decoder models, or quantised weights.

Shapes: B sequences, N positions, D = d_model, V = vocabulary.
"""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import transformers
import xxhash
from torch import Tensor, nn

from harvest.model import gguf
from harvest.model.aliases import hub_id, suggestions
from harvest.model.hub import first_line, pin, quiet
from harvest.model.soundness import refuse_damaged_cache, refuse_missing, refuse_more_blocks, refuse_not_causal
from residscope.errors import IncompatibleError, ResidscopeError, UsageError
from residscope.first_calls import settle_first_calls
from residscope.memory import keep_freed_memory

settle_first_calls(torch)  # before anything is computed, wherever a model is

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
_FINAL_NORM_NAMES = ("norm", "final_layer_norm", "ln_f", "final_layernorm", "norm_f", "final_norm")
_BLOCK = 1 << 22

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Which model, exactly. No weights are loaded yet."""

    name: str
    """What to call it; a hub id and a short name can be given to `resolve_model` again, a folder's or file's name
    only where it lies."""
    source: Literal["hub", "folder", "gguf"]
    """Where it comes from."""
    location: str
    """What transformers loads: the hub id, or the path of a folder."""
    revision: str | None = None
    """Commit on the hub."""
    fingerprint: str | None = None
    """Hash of the content: of a GGUF file (SHA-256), or of a folder's configuration, tokenizer and weights
    (xxh3-128)."""
    cached_only: bool = False
    """There is no network: load from the hub's local cache."""
    random_init: bool = False
    """Random weights instead of the model's own."""
    seed: int = 0
    """Seed of the random weights."""

    @property
    def load_arguments(self) -> dict[str, Any]:
        """Keywords of every `from_pretrained` call."""
        # Said outright, since transformers asks at the terminal where it is left open.
        common = {"trust_remote_code": False}
        if self.source != "hub":
            return {"local_files_only": True, **common}
        return {"revision": self.revision, "local_files_only": self.cached_only, **common}


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in evaluation mode on its device, with what interpretability needs to find in it."""

    spec: ModelSpec
    """Which model it is."""
    causal_lm: Any
    """The whole model, with the LM head: `causal_lm(input_ids).logits` is [B, N, V]."""
    base: Any
    """The model without its LM head; run this where logits are not needed."""
    tokenizer: Any
    """Its tokenizer."""
    blocks: nn.ModuleList
    """The transformer blocks, in order; block i's output is the residual stream after layer i."""
    d_model: int
    """Size of a residual stream vector."""
    architecture: str
    """Class of the whole model, such as GPTNeoXForCausalLM."""
    device: torch.device
    """Where it is."""
    dtype: torch.dtype
    """Format of its weights and of its forward pass."""
    without_head: bool = False
    """Whether its file has no LM head, so that the one here is random."""

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last block and the unembedding; `IncompatibleError` where it has no name that is
        known."""
        blocks_name = next(name for name, module in self.base.named_modules() if module is self.blocks)
        parent = self.base.get_submodule(blocks_name.rpartition(".")[0])
        for name in _FINAL_NORM_NAMES:
            found = getattr(parent, name, None)
            if isinstance(found, nn.Module):
                return found
        raise IncompatibleError(
            f"{self.spec.name} ({self.architecture}): no final norm beside the blocks; its children are"
            f" {[name for name, _ in parent.named_children()]}, the names that are known {list(_FINAL_NORM_NAMES)}"
        )

    @property
    def unembedding(self) -> nn.Module:
        """The linear map from the normed residual stream to logits; its weight is [V, D]."""
        if self.without_head:
            raise IncompatibleError(
                f"{self.spec.name}: the file of its weights has no LM head, so that nothing can be predicted; give the"
                f" model as {self.architecture} saves it"
            )
        found = self.causal_lm.get_output_embeddings()
        if not isinstance(found, nn.Module):
            raise IncompatibleError(f"{self.spec.name} ({self.architecture}): no unembedding is to be found")
        return found

    def logits(self, residual: Tensor) -> Tensor:
        """Logits [..., V] of residual stream vectors [..., D] as if they were the last block's output (the logit
        lens), scaled and soft-capped as the model does."""
        config = _text_config(self.causal_lm.config)
        logits = self.unembedding(self.final_norm(residual.to(self.dtype)))
        logits = logits * getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits


def resolve_model(name: str, *, revision: str | None = None, random_init: bool = False, seed: int = 0) -> ModelSpec:
    """The model that `name` stands for: a local folder, a GGUF file, a short name, or a hub id, in this order.

    Hashes local files, or asks the hub for the commit. Raises `UsageError` where there is no such model,
    `IncompatibleError` where what is there is none, `ResidscopeError` where the hub cannot be reached.
    """
    quiet()
    path = Path(name).expanduser()
    if path.is_dir() or path.is_file():
        if revision is not None:
            raise UsageError(f"--revision {revision}: {name} is a local path, which has no revisions")
        return _folder_spec(path, random_init, seed) if path.is_dir() else _file_spec(path, random_init, seed)
    packaged = gguf.packaged_gguf(name)
    if packaged and revision is None:
        return _gguf_spec(packaged, name.lower(), random_init, seed)
    if name.startswith((".", "/", "~")) or name.lower().endswith(".gguf"):
        raise UsageError(f"model {name}: there is no such file or folder")
    repo_id = hub_id(name) or name
    if "/" not in repo_id:
        close = suggestions(name)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise UsageError(
            f"unknown model {name!r}: neither a short name, a hub id (owner/name), a folder nor a GGUF file{hint}"
        )
    repo = pin(repo_id, "model", revision)
    return ModelSpec(
        name=repo_id,
        source="hub",
        location=repo_id,
        revision=repo.commit,
        cached_only=repo.cached_only,
        random_init=random_init,
        seed=seed,
    )


def load_config(spec: ModelSpec) -> Any:
    """The model's transformers configuration."""
    return _loading(
        spec, "configuration", lambda: transformers.AutoConfig.from_pretrained(spec.location, **spec.load_arguments)
    )


def load_tokenizer(spec: ModelSpec) -> Any:
    """The model's tokenizer."""
    return _loading(
        spec, "tokenizer", lambda: transformers.AutoTokenizer.from_pretrained(spec.location, **spec.load_arguments)
    )


def load_model(
    spec: ModelSpec, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", tokenizer: Any = None
) -> LoadedModel:
    """The model's weights in `dtype` on `device`, in evaluation mode, and its tokenizer unless one is given.

    Random weights are drawn in float32 and then rounded, so that they do not depend on `dtype`. Raises
    `IncompatibleError` where anything is missing or damaged or the blocks are not found, `ResidscopeError` where it
    cannot be downloaded or does not fit the memory.
    """
    device = torch.device(device)
    if device.type == "cpu":
        keep_freed_memory()  # Layer after layer makes the same temporaries.
    config = load_config(spec)
    model: Any
    model, missing, unused = _loading(spec, "model", lambda: _weights(spec, config, dtype))
    model = _loading(spec, "model", lambda: model.to(device)).eval().requires_grad_(False)
    architecture = type(model).__name__
    prefix = (
        model.base_model_prefix if hasattr(model, model.base_model_prefix) else "model"
    )  # Llama 4 misnames its own.
    base = getattr(model, prefix, None)
    if not isinstance(base, nn.Module):
        raise IncompatibleError(f"{spec.name} ({architecture}): the model without its LM head is not to be found")
    refuse_missing(spec.name, missing, prefix)
    blocks = find_blocks(base, n_layers_of(config))
    blocks_name = next(name for name, module in base.named_modules() if module is blocks)
    refuse_more_blocks(spec.name, unused, prefix, blocks_name, len(blocks))
    _loading(spec, "forward pass", lambda: refuse_not_causal(spec.name, architecture, base, longest_context(config)))
    return LoadedModel(
        spec=spec,
        causal_lm=model,
        base=base,
        tokenizer=tokenizer if tokenizer is not None else load_tokenizer(spec),
        blocks=blocks,
        d_model=d_model_of(config),
        architecture=architecture,
        device=device,
        dtype=dtype,
        without_head=bool(missing),
    )


def find_blocks(model: nn.Module, n_layers: int) -> nn.ModuleList:
    """The transformer blocks of a model: its unique shallowest ModuleList of length `n_layers`. `IncompatibleError`
    where there is none, or more than one."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    fitting = [(name.count("."), name, module) for name, module in lists if len(module) == n_layers]
    shallowest = [found for found in fitting if found[0] == min(depth for depth, _, _ in fitting)]
    if len(shallowest) == 1:
        return shallowest[0][2]
    if shallowest:
        raise IncompatibleError(
            f"{type(model).__name__}: the transformer blocks are ambiguous:"
            f" {', '.join(name for _, name, _ in shallowest)} all have {n_layers} modules at the same depth"
        )
    seen = ", ".join(f"{name} ({len(module)})" for name, module in lists) or "none"
    raise IncompatibleError(
        f"{type(model).__name__}: no list of {n_layers} transformer blocks, as many as its configuration says; lists"
        f" found: {seen}"
    )


def n_layers_of(config: Any) -> int:
    """Number of transformer blocks by the (text) configuration."""
    return int(_text_config(config).num_hidden_layers)


def d_model_of(config: Any) -> int:
    """Size of the residual stream by the (text) configuration."""
    return int(_text_config(config).hidden_size)


def longest_context(config: Any) -> int | None:
    """Most positions that the model takes, or None where it sets no limit."""
    found = getattr(_text_config(config), "max_position_embeddings", None)
    return int(found) if found and found > 0 else None  # XLNet has -1 for no limit.


def attention_of(config: Any) -> str | None:
    """Attention implementation to ask for: eager where scores are soft-capped (fused kernels may leave that out),
    else transformers' choice (None)."""
    return "eager" if getattr(_text_config(config), "attn_logit_softcapping", None) else None


def _text_config(config: Any) -> Any:
    return config.get_text_config()


def _weights(spec: ModelSpec, config: Any, dtype: torch.dtype) -> tuple[nn.Module, list[str], list[str]]:
    """The model, and the names of weights that its files lack, and of those that they have and it does not use."""
    attention = attention_of(config)
    arguments: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    auto = transformers.AutoModelForCausalLM
    if not spec.random_init:
        loaded: Any = auto.from_pretrained(
            spec.location, config=config, dtype=dtype, output_loading_info=True, **arguments, **spec.load_arguments
        )
        model, found = loaded
        if spec.source == "hub":
            _check_cache(spec)
        return model, sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        return auto.from_config(config, dtype=torch.float32, **arguments).to(dtype), [], []


def _check_cache(spec: ModelSpec) -> None:
    """Refuse files of the hub's cache that were damaged there: a commit says nothing of what is on this disk."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(spec.location, "config.json", revision=spec.revision)
    if isinstance(config, str):
        snapshot = Path(config).parent
        weights = next((found for pattern in _WEIGHT_PATTERNS if (found := sorted(snapshot.glob(pattern)))), [])
        refuse_damaged_cache(spec.name, snapshot, ["config.json", *_TOKENIZER_FILES, *(path.name for path in weights)])


def _loading(spec: ModelSpec, what: str, load: Callable[[], T]) -> T:
    """`load()`, with whatever the libraries raise turned into one line. They raise nearly everything, so that nothing
    narrower than Exception will do."""
    try:
        return load()
    except ResidscopeError:
        raise
    except torch.OutOfMemoryError as error:
        raise ResidscopeError(
            f"{spec.name}: the model does not fit the device's memory; try --dtype bfloat16 or --device cpu"
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        failed, way_out = "cannot be loaded", "; save or download the model again, or give another"
        if what == "forward pass":
            failed, way_out = "fails", ""
        # What is on the hub may be whole, and the network not.
        kind = ResidscopeError if spec.source == "hub" and what != "forward pass" else IncompatibleError
        raise kind(
            f"{spec.name}: its {what} {failed} ({type(error).__name__}: {first_line(error)}){way_out}"
        ) from error


def _folder_spec(path: Path, random_init: bool, seed: int) -> ModelSpec:
    folder = path.resolve()
    if not (folder / "config.json").is_file():
        raise IncompatibleError(
            f"model {path}: the folder has no config.json; give a folder that transformers' save_pretrained wrote"
        )
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise IncompatibleError(
            f"model {path}: the folder has no tokenizer ({', '.join(_TOKENIZER_FILES[:3])}); save the model's tokenizer"
            " there too"
        )
    files = [folder / name for name in ("config.json", *_TOKENIZER_FILES) if (folder / name).is_file()]
    if not random_init:
        weights = next((found for pattern in _WEIGHT_PATTERNS if (found := sorted(folder.glob(pattern)))), None)
        if weights is None:
            raise IncompatibleError(f"model {path}: the folder has no weights ({' or '.join(_WEIGHT_PATTERNS)})")
        files += weights
    return ModelSpec(
        name=folder.name,
        source="folder",
        location=str(folder),
        fingerprint=_fingerprint(files),
        random_init=random_init,
        seed=seed,
    )


def _file_spec(path: Path, random_init: bool, seed: int) -> ModelSpec:
    if path.suffix.lower() != ".gguf":
        raise IncompatibleError(
            f"model {path}: a file should be a .gguf file; give the folder that holds config.json for other formats"
        )
    return _gguf_spec(gguf.GgufFile(path.name, (path,)), path.name, random_init, seed)


def _gguf_spec(file: gguf.GgufFile, name: str, random_init: bool, seed: int) -> ModelSpec:
    digest = gguf.sha256(file)
    folder = gguf.unpacked_folder(file, digest)
    return ModelSpec(
        name=name, source="gguf", location=str(folder), fingerprint=digest, random_init=random_init, seed=seed
    )


def _fingerprint(files: list[Path]) -> str:
    """xxh3-128 over the names, sizes and contents of files of one folder."""
    digest = xxhash.xxh3_128()
    for path in files:
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()
