"""What the readers and writers of other projects' layouts share: named tensors, checked shapes, and what they return.

Nothing here touches a disk or a network; `train.formats.files` does. Not here: any one layout (`train.formats.layouts`,
`train.formats.saelens`).

Shapes: M n_latents, D d_model.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from residscope.errors import IncompatibleError
from train.model import MLSAE
from train.model_config import SAEConfig

OURS = "residscope"
"""The key under which we keep what a layout has no word for; the other tools ignore it."""


class TensorFile(Protocol):
    """An open safetensors file, as `safetensors.safe_open` gives it: names at once, tensors when asked for."""

    def keys(self) -> Collection[str]: ...

    def get_tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """One foreign autoencoder in our terms."""

    sae: MLSAE
    """The autoencoder, float32, on the CPU."""

    stored_dtype: str
    """Type of the encoder's weights in the file, such as "bfloat16"."""

    model: str | None = None
    """Which transformer it was trained on, where the folder says so."""

    layers: tuple[int, ...] | None = None
    """Which blocks' outputs it was trained on, where the folder says so."""

    store: dict[str, Any] | None = None
    """The store's record, where one of our own autoencoders was converted."""

    notes: tuple[str, ...] = ()
    """What a user has to know and the weights do not say."""


class LaidOut(NamedTuple):
    """One of our autoencoders as another project's files."""

    tensors: dict[str, Tensor]
    """By the names of that layout; contiguous float32."""

    config: dict[str, Any]
    """Its JSON configuration."""

    notes: tuple[str, ...]
    """What the layout cannot say."""


class Reader(NamedTuple):
    """A tensor file and where it is, for errors that name it."""

    file: TensorFile
    where: str
    prefix: str = ""

    def get(self, name: str, *shape: int | None) -> Tensor:
        """Tensor `name`, whose shape must be `shape` (None: any size)."""
        if self.prefix + name not in self.file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
            raise IncompatibleError(f"{self.where}: {name} is missing; it holds {listed(sorted(self.names()))}")
        tensor = self.file.get_tensor(self.prefix + name)
        wrong = [1 for size, wanted in zip(tensor.shape, shape, strict=False) if wanted not in (None, size)]
        if tensor.dim() != len(shape) or wrong:
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise IncompatibleError(f"{self.where}: {name} should have shape [{expected}], it has {list(tensor.shape)}")
        return tensor

    def names(self) -> set[str]:
        return {name.removeprefix(self.prefix) for name in self.file.keys() if name.startswith(self.prefix)}  # noqa: SIM118

    def require_only(self, known: Collection[str]) -> None:
        """Refuse tensors that we do not know: each could change the reconstruction."""
        if unknown := sorted(self.names() - set(known)):
            raise IncompatibleError(
                f"{self.where}: holds {listed(unknown)}, which an autoencoder of this kind without a skip connection, "
                "gate or lens of its own does not have; such models are not read here"
            )


def assemble(config: SAEConfig, *, b_enc: Tensor | None = None, **tensors: Tensor) -> MLSAE:
    """The autoencoder of these tensors; an encoder bias that is zero everywhere is left out."""
    if b_enc is not None and bool((b_enc != 0).any()):
        config, tensors = replace(config, encoder_bias=True), {**tensors, "b_enc": b_enc}
    sae = MLSAE(config)
    sae.load_state_dict(tensors)
    return sae


def encoder_bias(sae: MLSAE) -> Tensor:
    """[M] its encoder bias, or zeros."""
    return sae.b_enc if sae.config.encoder_bias else torch.zeros(sae.config.n_latents)


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As the files want them: float32, on the CPU, one block of memory each, none shared."""
    return {
        name: tensor.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are: for errors."""
    return (", ".join(names[:8]) or "nothing") + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def checked_k(found: Any, n_latents: int, where: str) -> int:
    """k as a configuration gives it, if that is possible."""
    if type(found) is not int or not 1 <= found <= n_latents:
        raise IncompatibleError(
            f"{where}: k should be a whole number from 1 to n_latents {n_latents}, the configuration says {found!r}"
        )
    return found


def check_sizes(config: Mapping[str, Any], where: str, **sizes: int) -> None:
    """Refuse a configuration that speaks of other sizes than the weights beside it have: it belongs to others."""
    for name, size in sizes.items():
        found = config.get(name)
        if type(found) is int and found > 0 and found != size:  # 0 or nothing: left to the weights
            raise IncompatibleError(f"{where}: the configuration says {name} {found}, the weights have {size}")


def dtype_name(tensor: Tensor) -> str:
    """Such as "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")


def layer_numbers(found: Any) -> tuple[int, ...] | None:
    """A list of layers as a tuple; None for anything else, and for an empty one."""
    return tuple(int(layer) for layer in found) or None if isinstance(found, list | tuple) else None


def our_record(sae: MLSAE, store: Mapping[str, Any]) -> dict[str, Any]:
    """What we keep under `OURS`."""
    return {**asdict(sae.config), "store": dict(store)}


def our_store(found: Any) -> dict[str, Any] | None:
    """The store's record in what we kept."""
    return mapping(mapping(found).get("store")) or None


def mapping(found: Any) -> dict[str, Any]:
    """`found` if it is a JSON object, else an empty one."""
    return found if isinstance(found, dict) else {}


def lens_note(store: Mapping[str, Any]) -> tuple[str, ...]:
    """A word of warning, where the vectors went through a lens."""
    lens = store.get("lens")
    return (f"it was trained on vectors that went through a tuned lens ({lens}): give it such vectors",) if lens else ()
