"""What latents do to the model's predictions: they are taken out of the residual stream after one, some or all blocks,
or added to it, while the model runs.

With a_j the latent's activation at a vector x of layer l, s the scale that x was divided by when it was standardised,
and d_j the latent's row of W_dec, at every kept position

    ablate    x' = x - a_j s d_j              what the latent contributed to the reconstruction is missing
    steer     x' = x + c s d_j                as if its activation were higher by c; c may be negative

Changes of one block add up, each worked out from the block's own output; a later block's is worked out from what the
earlier changes made of it. The reconstruction's own error stays as it is, so that an intervention of nothing changes
nothing. In a store that went through a lens the sum is made in the lens's basis and taken back through its inverse. The
true run goes through neither autoencoder nor lens.

The results, with p the next-token probabilities of the true run and q those of the changed one: KL(p || q) in nats at
the last position and as the mean over kept positions; the tokens whose probability at the last position rises and falls
most; and by how much their logits change, less the mean change over the vocabulary.

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
"""Tokens shown at each end, and of the prediction after the text; of the prediction at each token of it."""

TILE = 64
"""Positions whose logits are held at a time."""

LARGEST = 1e38
"""Coefficients of steering must be smaller, to fit into float32."""


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """A change of the residual stream, the same after each of some blocks."""

    kind: Literal["ablate", "steer"]
    latent: int
    layers: tuple[int, ...] | Literal["all"] | None
    """The model's block indices; None: where the latent is strongest on the prompt."""
    coefficient: float | None = None
    """Activation that steering adds."""
    positions: tuple[int, ...] | None = None
    """Those of the text at which it is made, from 0; None: all kept ones, and new tokens too."""

    def at(self, every: Sequence[int], strongest: int | None = None) -> "Intervention":
        """The same with its layers by number. every: those trained on."""
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
    """Less the mean change over the vocabulary."""


class Effect(NamedTuple):
    kl_last: float
    """KL(true || changed) at the last position, nats."""
    kl_mean: float
    """The mean over kept positions, nats per token."""
    increased: list[TokenChange]
    """Tokens whose probability rises most, the foremost first; fewer than `N_SHOWN` where fewer rise."""
    decreased: list[TokenChange]
    next_changed: list[tuple[int, float]]
    """Token and probability, the likeliest first, after the prompt in the changed run."""
    watched: list[TokenChange]
    """Tokens that were asked for."""


class PromptedModel(NamedTuple):
    """Model, autoencoder and lens, and the format that the store keeps vectors in."""

    model: LoadedModel
    sae: MLSAE
    """On the model's device."""
    lens: TunedLens | None
    stored_dtype: str
    check: Callable[[], object] = bool
    """Called at each layer; what it raises ends the work."""

    def seen(self, x: Tensor, layer: int) -> Tensor:
        """Block outputs [n, D] as the autoencoder would get them from the store: through the lens, rounded."""
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
        wanted = "such as 17:10:8, 17:3,4:8, 17:all:8 or, at position 5 alone, 17:10:8@5 (8 is what is added)"
        raise UsageError(f"--steer should be LATENT:LAYER:COEFFICIENT, {wanted}, found {text!r}") from None


def parse_ablate(text: str) -> Intervention:
    """LATENT, LATENT:LAYERS, or one of them and @POSITIONS."""
    try:
        what, at = _parts(text)
        latent, _, layers = what.partition(":")
        return Intervention(kind="ablate", latent=int(latent), layers=_layers(layers) if layers else None, positions=at)
    except ValueError:
        wanted = "such as 17, 17:10, 17:3,4, 17:all or, at position 5 alone, 17:10@5"
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
    """The block's outputs x [n, D] at `position`, int64 [n], changed; float32."""
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
    # The inverse is affine: of a difference it is the difference of inverses.
    return x.float() + (prompted.lens.invert(shift, layer) - prompted.lens.invert(torch.zeros_like(shift), layer))


@contextmanager
def changing(
    prompted: PromptedModel, blocks: nn.ModuleList, interventions: Sequence[Intervention], kept: Tensor | None = None
) -> Iterator[None]:
    """Within it the blocks' outputs are changed, by hooks and nothing else.

    kept: bool [B, N], where, in passes over N positions; by default everywhere but at a sequence's first position, on
    which no autoencoder is trained. A pass over one position, as generation makes them, is changed there."""

    def hook(module: nn.Module, arguments: Any, output: Any, *, layer: int, own: Sequence[Intervention]) -> Any:
        shape = (output[0] if isinstance(output, tuple | list) else output).shape[:2]
        if kept is not None and kept.shape == shape:
            where = kept
        else:
            where = torch.ones(shape, dtype=torch.bool, device=prompted.sae.W_dec.device)
            where[:, 0] = shape[1] == 1
        position = where.nonzero()[:, 1] - int(shape[1] == 1)  # -1, that of no intervention, for a new token
        return with_residual(output, partial(changed_vectors, prompted, own, layer=layer, position=position), where)

    with ExitStack() as stack:
        for layer, block in enumerate(blocks):
            if own := [one for one in interventions if one.layers == "all" or layer in (one.layers or ())]:
                stack.enter_context(block.register_forward_hook(partial(hook, layer=layer, own=own)))
        yield


class PromptRun:
    """A prompt that went through the untouched model, ready for interventions."""

    @torch.inference_mode()
    def __init__(self, prompted: PromptedModel, input_ids: Tensor, kept: Tensor, true: Tensor | None = None) -> None:
        """input_ids: int64 [1, N]; kept: bool [1, N]; true: the last block's output [1, N, D], if it is known."""
        self.prompted = prompted
        self._ids, self._kept = input_ids, kept.to(prompted.model.device)
        true = last_output(prompted.model, input_ids) if true is None else true
        self._known = TrueRun(prompted.model.logits, true[self._kept])
        self._last_logits = prompted.model.logits(true[0, -1]).float()  # [V]
        self.next_tokens = likeliest(self._last_logits.softmax(dim=-1))
        """Of the token after the prompt."""
        logits = (prompted.model.logits(part).float() for part in true[0].split(TILE))
        self.next_at = [likeliest(p, N_AT_TOKEN) for part in logits for p in part.softmax(dim=-1)]
        """[N] of the token after each."""

    @torch.inference_mode()
    def effect(self, interventions: Sequence[Intervention], watched: Sequence[int] = ()) -> Effect:
        """Run again with all of these changes, whose layers are numbers. watched: tokens whose own change is wanted."""
        model = self.prompted.model
        with changing(self.prompted, model.blocks, interventions, self._kept):
            changed = last_output(model, self._ids)
        replaced = changed[self._kept]
        target = torch.zeros(len(replaced), dtype=torch.int64, device=model.device)  # cross-entropies are not used
        kl = compare(self._known, [replaced], target)[2]
        logits = model.logits(changed[0, -1]).float()
        if logits.isnan().any():
            what = ", ".join(f"{one.kind} latent {one.latent}" for one in interventions)
            raise UsageError(f"{what}: the model's predictions become NaN; use a smaller coefficient")
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
        """At most so many tokens that the model goes on with, each the likeliest; new ones are changed too."""
        model = self.prompted.model
        ids = self._ids.to(model.device)
        with changing(self.prompted, model.blocks, interventions, self._kept):
            # The model's own configuration may ask for penalties, with which the likeliest is not taken.
            end = model.causal_lm.generation_config.eos_token_id
            how = GenerationConfig(do_sample=False, max_new_tokens=n_tokens, pad_token_id=0, eos_token_id=end)
            made = model.causal_lm.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)
        return made[0, ids.shape[1] :].tolist()


def likeliest(p: Tensor, most: int = N_SHOWN) -> list[tuple[int, float]]:
    """The likeliest tokens and their probabilities, of p [V]."""
    probability, token = p.topk(min(most, len(p)))
    return list(zip(token.tolist(), probability.tolist(), strict=True))
