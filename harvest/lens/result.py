"""What fitting a lens gives: how good it is, layer by layer. `fit.json` holds the same."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LayerFit:
    """How good the lens is at one layer. KL in nats per token on held-out documents; lower is better."""

    layer: int | None
    """Block whose output it is; None for the embedding, which enters block 0."""
    translator: int | None
    """Its translator; None for the last block, which takes none."""
    kl_logit_lens: float
    """Without a translator."""
    kl_ridge: float | None = None
    """With the ridge one."""
    kl_trained: float | None = None
    """With the KL-trained one; None where none was trained."""
    penalty: float | None = None
    """Ridge penalty, in units of the mean eigenvalue of the inputs' scatter matrix."""
    r2: float | None = None
    """Share of the variance of (last output - this) that ridge explained on documents that chose the penalty."""
    condition: float | None = None
    """Condition number of I + W, of the translator that was saved."""
    round_trip: float | None = None
    """Worst |inverse(apply(x)) - x| / |x| over held-out vectors."""


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a fit made."""

    out: str
    """Folder of the lens."""
    model: str
    """Its model."""
    architecture: str
    """Class of the model."""
    saved: str
    """Which translators were saved: ridge, or KL-trained."""
    init: str | None
    """Where KL training began; None without it."""
    fit_tokens: int
    """Kept tokens that ridge was fitted on."""
    fit_documents: int
    """Documents that they come from."""
    kl_tokens: int
    """Tokens that KL training saw, repeats included."""
    kl_steps: int
    """Its steps."""
    held_out_tokens: int
    """Kept tokens that were measured on."""
    held_out_documents: int
    """Documents that they come from."""
    seconds: dict[str, float]
    """Time of each phase."""
    layers: tuple[LayerFit, ...]
    """The embedding, then each block."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)
