"""What latents do to the model's predictions: while the model runs, they are subtracted from the residual stream after
one, some or all blocks, or added to it.

With a_j the latent's activation at a vector x of layer l, s the scale that x is divided by in standardisation, and d_j
the latent's row of W_dec, at every kept position

    ablate    x' = x - a_j s d_j              the latent's contribution to the reconstruction is removed
    steer     x' = x + c s d_j                as if its activation were higher by c; c may be negative

Changes after the same block add up, each computed from the block's own output; those after a later block are computed
from its output in the changed run. The reconstruction error stays in place, so an empty intervention changes nothing.
If the store was harvested through a lens, the sum is made in the lens's basis and mapped back by its inverse. The true
run uses neither autoencoder nor lens.

The results, with p the next-token probabilities of the true run and q those of the changed one: KL(p || q) in nats at
the last position and averaged over kept positions; the tokens whose probability at the last position rises or falls
most; and the changes of their logits, minus the mean change over the vocabulary.

Shapes: N positions, D d_model, V vocabulary, n kept positions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from analysis.model.continuation import last_output
from analysis.model.downstream import TrueRun, compare, with_residual
from harvest.lens.translators import TunedLens
from harvest.model.load import LoadedModel
from residscope.errors import UsageError
from train.kernels.interface import SparseCodes
from train.model import MLSAE

N_SHOWN, N_AT_TOKEN = 8, 3
"""Number of tokens shown that rise most, that fall most, and that are likeliest after the text; and after each of its
tokens."""

TILE = 64
"""Positions whose logits are held at once."""

LARGEST = 1e38
"""Steering coefficients must be smaller, so that they fit into float32."""


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """A change of the residual stream after one or more blocks."""

    kind: Literal["ablate", "steer"]
    latent: int
    layers: tuple[int, ...] | Literal["all"] | None
    """The model's block indices; None: the layer where the latent is strongest on the prompt."""
    coefficient: float | None = None
    """Activation added by steering."""
    positions: tuple[int, ...] | None = None
    """Positions of the text, from 0, at which to make the change; None: all kept ones, and generated tokens."""

    def at(self, every: Sequence[int], strongest: int | None = None) -> "Intervention":
        """The same with its layers as numbers. every: the layers trained on. strongest: see `layers`."""
        found = () if strongest is None else (strongest,)
        return replace(
            self, layers=tuple(every) if self.layers == "all" else found if self.layers is None else self.layers
        )


class TokenChange(NamedTuple):
    """How the prediction of one next token changes."""

    token_id: int
    p_true: float
    p_changed: float
    logit_change: float
    """Minus the mean change over the vocabulary."""


class Effect(NamedTuple):
    kl_last: float
    """KL(true || changed) at the last position, nats."""
    kl_mean: float
    """Its mean over kept positions, nats per token."""
    increased: list[TokenChange]
    """Up to `N_SHOWN` tokens whose probability rises most, largest rise first."""
    decreased: list[TokenChange]
    next_changed: list[tuple[int, float]]
    """Likeliest tokens after the prompt in the changed run, with their probabilities, in falling order."""
    watched: list[TokenChange]
    """The requested tokens."""


class PromptedModel(NamedTuple):
    """Model, autoencoder and lens, and the store's number format."""

    model: LoadedModel
    sae: MLSAE
    """On the model's device."""
    lens: TunedLens | None
    stored_dtype: str
    check: Callable[[], object] = bool
    """Called at each layer; may raise to stop the work."""

    def seen(self, x: Tensor, layer: int) -> Tensor:
        """Block outputs [n, D] as the autoencoder would get them from the store: after the lens, rounded."""
        self.check()
        y = x.float() if self.lens is None else self.lens.apply(x, layer)
        return y.to(getattr(torch, self.stored_dtype)).float()

    def codes(self, x: Tensor, layer: int) -> SparseCodes:
        """Codes of block outputs [n, D]."""
        return self.sae.encode(self.seen(x, layer), self.sae.rows_of_layer(layer, len(x)))


def parse_steer(text: str) -> Intervention:
    """LATENT:LAYERS:COEF or LATENT:LAYERS:COEF@POSITIONS."""
    try:
        what, at = _parts(text)
        latent, layers, coefficient = what.split(":")
        if not abs(amount := float(coefficient)) < LARGEST:  # NaN too
            raise ValueError(coefficient)
        return Intervention(kind="steer", latent=int(latent), layers=_layers(layers), coefficient=amount, positions=at)
    except ValueError:
        wanted = "such as 17:10:8, 17:3,4:8, 17:all:8 or, only at position 5, 17:10:8@5 (8 is added)"
        raise UsageError(f"--steer should be LATENT:LAYER:COEFFICIENT, {wanted}, found {text!r}") from None


def parse_ablate(text: str) -> Intervention:
    """LATENT or LATENT:LAYERS, either followed by @POSITIONS."""
    try:
        what, at = _parts(text)
        latent, _, layers = what.partition(":")
        return Intervention(kind="ablate", latent=int(latent), layers=_layers(layers) if layers else None, positions=at)
    except ValueError:
        wanted = "such as 17, 17:10, 17:3,4, 17:all or, only at position 5, 17:10@5"
        raise UsageError(f"--ablate should be LATENT or LATENT:LAYER, {wanted}, found {text!r}") from None


def _parts(text: str) -> tuple[str, tuple[int, ...] | None]:
    what, at, positions = text.partition("@")
    return what, _numbers(positions) if at else None


def _layers(text: str) -> tuple[int, ...] | Literal["all"]:
    return "all" if text == "all" else _numbers(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted({int(number) for number in text.split(",")}))


@torch.no_grad()
def changed_vectors(
    prompted: PromptedModel, interventions: Sequence[Intervention], x: Tensor, layer: int, position: Tensor
) -> Tensor:
    """The changed outputs of a block, float32, from its outputs x [n, D] at `position` int64 [n]."""
    sae, y = prompted.sae, prompted.seen(x, layer)
    std = sae.standardize(y.clone(), sae.rows_of_layer(layer, len(y))).std  # [n, 1]
    shift = torch.zeros_like(y)  # [n, D]
    values, indices = prompted.codes(x, layer) if any(one.kind == "ablate" for one in interventions) else (y, y)
    for one in interventions:
        if one.kind == "steer":
            amount = torch.full((len(x), 1), one.coefficient or 0.0, device=x.device)
        else:
            amount = -values.where(indices == one.latent, 0).sum(dim=1, keepdim=True)  # [n, 1]
        if one.positions is not None:
            amount = amount * torch.isin(position, position.new_tensor(one.positions)).unsqueeze(1)
        shift += amount * std * sae.W_dec[one.latent]
    if prompted.lens is None:
        return x.float() + shift
    # The inverse is affine, so the shift itself is mapped by the difference of two inverses.
    return x.float() + (prompted.lens.invert(shift, layer) - prompted.lens.invert(torch.zeros_like(shift), layer))


@contextmanager
def changing(
    prompted: PromptedModel, blocks: nn.ModuleList, interventions: Sequence[Intervention], kept: Tensor | None = None
) -> Iterator[None]:
    """Within the block, hooks change the outputs of the model's `blocks`.

    kept: bool [B, N], where to change them in passes over N positions; by default everywhere except at a sequence's
    first position, on which no autoencoder is trained. Passes over one position, as in generation, are changed there.
    """

    def hook(module: nn.Module, arguments: Any, output: Any, *, layer: int, own: Sequence[Intervention]) -> Any:
        shape = (output[0] if isinstance(output, tuple | list) else output).shape[:2]
        if kept is not None and kept.shape == shape:
            where = kept
        else:
            where = torch.ones(shape, dtype=torch.bool, device=prompted.sae.W_dec.device)
            where[:, 0] = shape[1] == 1
        position = where.nonzero()[:, 1] - int(shape[1] == 1)  # -1 for a new token, which no intervention names
        return with_residual(output, partial(changed_vectors, prompted, own, layer=layer, position=position), where)

    with ExitStack() as stack:
        for layer, block in enumerate(blocks):
            if own := [one for one in interventions if one.layers == "all" or layer in (one.layers or ())]:
                stack.enter_context(block.register_forward_hook(partial(hook, layer=layer, own=own)))
        yield


class PromptRun:
    """A prompt that was run through the unmodified model, ready for interventions."""

    @torch.inference_mode()
    def __init__(self, prompted: PromptedModel, input_ids: Tensor, kept: Tensor, true: Tensor | None = None) -> None:
        """input_ids: int64 [1, N]; kept: bool [1, N]; true: the last block's output [1, N, D], if it is known."""
        self.prompted = prompted
        self._ids, self._kept = input_ids, kept.to(prompted.model.device)
        true = last_output(prompted.model, input_ids) if true is None else true
        self._known = TrueRun(prompted.model.logits, true[self._kept])
        self._last_logits = prompted.model.logits(true[0, -1]).float()  # [V]
        self.next_tokens = likeliest(self._last_logits.softmax(dim=-1))
        """The likeliest tokens after the prompt."""
        logits = (prompted.model.logits(part).float() for part in true[0].split(TILE))
        self.next_at = [likeliest(p, N_AT_TOKEN) for part in logits for p in part.softmax(dim=-1)]
        """[N] the likeliest tokens after each token."""

    @torch.inference_mode()
    def effect(self, interventions: Sequence[Intervention], watched: Sequence[int] = ()) -> Effect:
        """Run again with all of these changes, whose layers must be numbers. watched: further tokens to report."""
        model = self.prompted.model
        with changing(self.prompted, model.blocks, interventions, self._kept):
            changed = last_output(model, self._ids)
        replaced = changed[self._kept]
        target = torch.zeros(len(replaced), dtype=torch.int64, device=model.device)  # cross-entropies are not used
        kl = compare(self._known, [replaced], target)[2]
        logits = model.logits(changed[0, -1]).float()
        if logits.isnan().any():
            what = ", ".join(f"{one.kind} latent {one.latent}" for one in interventions)
            raise UsageError(f"{what}: the model's predictions become NaN: use a smaller coefficient")
        log_p, log_q = self._last_logits.log_softmax(dim=-1), logits.log_softmax(dim=-1)
        p, q, logit_change = self._last_logits.softmax(dim=-1), logits.softmax(dim=-1), logits - self._last_logits
        logit_change -= logit_change.mean()

        def changes(tokens: Sequence[int]) -> list[TokenChange]:
            return [TokenChange(i, float(p[i]), float(q[i]), float(logit_change[i])) for i in tokens]

        def foremost(rise: Tensor) -> list[TokenChange]:
            found = rise.topk(min(N_SHOWN, len(rise))).indices.tolist()
            return changes([i for i in found if rise[i] > 0])

        return Effect(
            kl_last=float((log_p.exp() * (log_p - log_q)).sum()),
            kl_mean=float(kl.mean()),
            increased=foremost(q - p),
            decreased=foremost(p - q),
            next_changed=likeliest(q),
            watched=changes(watched),
        )

    @torch.inference_mode()
    def continued(self, n_tokens: int, interventions: Sequence[Intervention] = ()) -> list[int]:
        """At most `n_tokens` tokens that continue the prompt, always the likeliest; changes apply to new ones too."""
        model = self.prompted.model
        ids = self._ids.to(model.device)
        with changing(self.prompted, model.blocks, interventions, self._kept):
            # The model's own configuration may have penalties, with which the likeliest token is not chosen.
            end = model.causal_lm.generation_config.eos_token_id
            how = GenerationConfig(do_sample=False, max_new_tokens=n_tokens, pad_token_id=0, eos_token_id=end)
            made = model.causal_lm.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)
        return made[0, ids.shape[1] :].tolist()


def likeliest(p: Tensor, most: int = N_SHOWN) -> list[tuple[int, float]]:
    """The likeliest tokens and their probabilities, of p [V]."""
    probability, token = p.topk(min(most, len(p)))
    return list(zip(token.tolist(), probability.tolist(), strict=True))
