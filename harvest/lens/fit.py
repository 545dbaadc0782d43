"""Fits a tuned lens, from start to end: vectors from a store or from the model, ridge translators, KL training,
measurement, and the lens's folder, whose files appear together or not at all.

How: one pass over the text computes the regression sums of every translator (ridge.py). If asked for, KL training
follows on a random part of the same tokens, starting from the ridge translators or from zero (kl.py). Both kinds are
made invertible and measured on held-out documents (measure.py), always by running the model itself. A fit that was
stopped starts over.

Shapes: L = n_layers translators, D = d_model; T tokens; translator i takes the input of block i.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from harvest.lens import data, kl
from harvest.lens.config import FitLensConfig
from harvest.lens.data import Role
from harvest.lens.measure import condition, limit_condition, mean_kl, round_trip
from harvest.lens.result import FitResult, LayerFit
from harvest.lens.ridge import RegressionSums, RidgeFit, fit_ridge
from harvest.lens.translators import TunedLens, write_lens
from harvest.model.checks import check_logits, check_model, refuse_other_weights
from harvest.model.load import LoadedModel
from harvest.sequences import SequenceBatch, sequence_batches, token_ids
from harvest.settings import Settings, load_weights, require_in_vocabulary, resolve
from harvest.table import make_table
from harvest.text.sources import open_sources
from residscope.console import human_bytes, progress
from residscope.destinations import refuse_taken, require_name, together
from residscope.errors import IncompatibleError, ResidscopeError, UsageError
from store.activations import ActivationStore
from store.arrays import TokenTable
from store.folder import refuse_inside_store

_FILES = ("config.json", "params.pt", "fit.json")
_WINDOW_BYTES = 512 << 20
_ROUND_TRIP_VECTORS = 512
_KL_SHARE = 0.25
"""KL training uses at least this share of a batch's tokens, so that forward passes take less than half of the time."""


class Fit(NamedTuple):
    """What every phase of a fit needs."""

    config: FitLensConfig
    vocabulary: int
    model: LoadedModel
    tokens: TokenTable
    role: np.ndarray
    """The `Role` of each token, [T]."""
    batches: list[SequenceBatch]
    """The sequences."""
    read: data.Reader
    """Reads the vectors of a batch, from the store if there is one."""
    run: data.Reader
    """Computes the vectors of a batch by running the model."""


def fit_lens(config: FitLensConfig) -> FitResult:
    """Fit, measure and write a lens.

    Raises `UsageError` for options that cannot work, `IncompatibleError` if the store is of another model, was made
    with a lens or lacks layers, `ResidscopeError` for the rest.
    """
    _refuse_existing(config)
    store = _open_store(config)
    settings = resolve(config.for_harvest())
    for note in settings.notes:
        print(note, file=sys.stderr)
    if store is not None:
        refuse_other_weights(settings.spec, store)
        tokens = store.tokens
    else:
        sources = open_sources(config.text, known=settings.known_ids)
        tokens, _ = make_table(sources, settings.tokenizer, settings.packing, config.max_tokens)
        require_in_vocabulary(settings, tokens.token_id)
    role = data.roles(tokens, config.validation_fraction, config.seed)
    data.require_tokens(role, settings.d_model)
    with together(config.out, _FILES, _FILES[:1], replace=False) as folder:
        fit = _start(config, settings, store, tokens, role)
        saved, result = _fit(fit)
        write_lens(folder, fit.model, saved, extra={"fit.json": {**asdict(result), "options": config.for_record()}})
    return result


def _refuse_existing(config: FitLensConfig) -> None:
    refuse_inside_store(config.out)
    require_name(config.out)
    names = {path.name for path in config.out.iterdir()} if config.out.is_dir() else {""}
    if config.out.exists() and names - {*_FILES, ".partial"}:
        raise UsageError(f"--out {config.out} exists and will not be overwritten. Choose another --out, or remove it")
    refuse_taken(config.out, _FILES, replace=False)


def _open_store(config: FitLensConfig) -> ActivationStore | None:
    """The store, which must hold every layer, without a lens."""
    if config.store is None:
        return None
    store = ActivationStore.open(config.store)
    meta = store.meta
    if meta.lens is not None:
        what = "a lens is fitted on the model's own vectors; give a store that was harvested without --lens"
        raise IncompatibleError(f"--store {config.store} was made with lens {meta.lens.get('id')!r}: {what}")
    if meta.n_layers != meta.n_model_layers:
        raise IncompatibleError(
            f"--store {config.store} holds {meta.n_layers} of the model's {meta.n_model_layers} layers: a lens needs"
            " them all; give a store that was harvested without --layers"
        )
    return store


def _start(
    config: FitLensConfig, settings: Settings, store: ActivationStore | None, tokens: TokenTable, role: np.ndarray
) -> Fit:
    """Load the model, and check its logits and the store's vectors."""
    model = load_weights(settings)
    batches = sequence_batches(tokens.position, data.tokens_in_batch(model.n_layers, model.d_model))
    first = batches[0]
    first = first._replace(stop=first.start + first.length)
    check_logits(model, torch.from_numpy(token_ids(tokens.token_id, first)))
    run = read = data.model_reader(model, tokens.token_id)
    if store is not None:
        check_model(store, model, None)
        read = data.model_reader(model, tokens.token_id, store)
    return Fit(config, settings.vocabulary, model, tokens, role, batches, read, run)


def _fit(fit: Fit) -> tuple[TunedLens, FitResult]:
    fitting, model = fit.config.fitting, fit.model
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal began
        seconds[name] = time.perf_counter() - began
        began = time.perf_counter()

    ridge_fits, means = _ridge(fit)
    parts = zip(*((found.weight.float(), found.bias.float()) for found in ridge_fits), strict=True)
    ridge = TunedLens(*map(torch.stack, parts))
    lap("ridge")
    lenses = {"ridge": ridge}
    if fitting.method == "kl":
        lenses["KL-trained"] = _kl_trained(fit, ridge, means)
        lap("KL training")
    saved = list(lenses)[-1]
    mask = data.measured_tokens(fit.tokens.position, fit.role == Role.HELD_OUT, fit.config.eval_tokens, fit.config.seed)
    kls, sample = _measure(fit, lenses, mask)
    layers = _layers(ridge_fits, lenses[saved], kls, sample)
    lap("measuring")
    used = np.isin(fit.role, (Role.FIT, Role.CHOOSE))
    kl_steps = fitting.kl_steps if fitting.method == "kl" else 0
    return lenses[saved], FitResult(
        out=str(fit.config.out),
        model=model.spec.name,
        architecture=model.architecture,
        saved=saved,
        init=fitting.init if fitting.method == "kl" else None,
        fit_tokens=int(used.sum()),
        fit_documents=len(np.unique(fit.tokens.document[used])),
        kl_tokens=kl_steps * fitting.kl_batch,
        kl_steps=kl_steps,
        held_out_tokens=int(mask.sum()),
        held_out_documents=len(np.unique(fit.tokens.document[mask])),
        seconds=seconds,
        layers=layers,
    )


def _ridge(fit: Fit) -> tuple[list[RidgeFit], Tensor]:
    """The ridge fits, made invertible, and the inputs' means, float32 [L, D]."""
    sums = _regression_sums(fit)
    # A product that overflowed stays in the sums, and the factorisations below would fail on it with a worse message.
    if not all(bool(s.xx.isfinite().all() and s.xr.isfinite().all()) for of_role in sums.values() for s in of_role):
        raise ResidscopeError(f"{fit.model.spec.name}: its vectors are not all finite; try --dtype float32")
    fits: list[RidgeFit] = []
    means: list[Tensor] = []
    for to_fit, to_choose in zip(sums[Role.FIT], sums[Role.CHOOSE], strict=True):
        found = fit_ridge(to_fit, to_choose)
        limit = fit.config.fitting.max_condition
        weight, bias = limit_condition(found.weight, found.bias, to_fit.mean_x, limit)
        fits.append(found._replace(weight=weight, bias=bias))
        means.append(to_fit.mean_x.float())
    return fits, torch.stack(means)


def _regression_sums(fit: Fit) -> dict[Role, list[RegressionSums]]:
    """Each translator's sums over the documents to fit on, and over those that choose the penalty."""
    n_layers, d_model, device = fit.model.n_layers, fit.model.d_model, fit.model.device
    print(
        f"host memory for Gram sums: {human_bytes(2 * n_layers * 2 * d_model**2 * 8)}, for vectors: about"
        f" {human_bytes(2 * data.tokens_in_batch(n_layers, d_model) * (n_layers + 1) * d_model * 4)}",
        file=sys.stderr,
    )
    sums = {role: [RegressionSums(d_model, device) for _ in range(n_layers)] for role in (Role.FIT, Role.CHOOSE)}
    with progress("ridge", "tok", len(fit.role)) as bar:
        for batch in fit.batches:
            vectors = fit.read(batch)
            for role, of_role in sums.items():
                rows = torch.from_numpy(np.flatnonzero(fit.role[batch.start : batch.stop] == role)).to(device)
                last = vectors[-1][rows]
                for x, layer_sums in zip(vectors, of_role, strict=False):  # All but the last output.
                    layer_sums.add(x[rows], last)
            bar.update(batch.stop - batch.start)
    return sums


def _kl_trained(fit: Fit, ridge: TunedLens, means: Tensor) -> TunedLens:
    """The KL-trained translators, made invertible. means: those of their inputs, [L, D]."""
    options, model = fit.config.fitting, fit.model
    begin = torch.clone if options.init == "ridge" else torch.zeros_like
    weights, biases = begin(ridge.weights), begin(ridge.biases)
    wanted = options.kl_steps * options.kl_batch
    window = min(_WINDOW_BYTES // ((model.n_layers + 1) * model.d_model * 4), wanted)
    sizes = {"per_step": options.kl_batch, "steps": options.kl_steps, "window": window}
    batches = data.shuffled(fit.read, fit.batches, _kl_tokens(fit, wanted), seed=fit.config.seed, **sizes)
    with progress("KL training", "step", options.kl_steps) as bar:

        def show(kls: list[float]) -> None:
            bar.set_postfix_str(f"mean KL {sum(kls) / len(kls):.3f}", refresh=False)
            bar.update(1)

        kl.train(weights, biases, batches, model.logits, options, vocabulary=fit.vocabulary, after_step=show)
    for i in range(model.n_layers):
        if not bool(weights[i].isfinite().all() and biases[i].isfinite().all()):
            raise ResidscopeError(f"KL training of translator {i} diverged; try a lower --lr than {options.first_lr:g}")
        weight, bias, mean = (part[i].double() for part in (weights, biases, means))
        weights[i], biases[i] = limit_condition(weight, bias, mean, options.max_condition)
    return TunedLens(weights, biases)


def _kl_tokens(fit: Fit, wanted: int) -> np.ndarray:
    """The tokens from which KL training draws the `wanted` ones, bool [T]."""
    usable = np.flatnonzero(np.isin(fit.role, (Role.FIT, Role.CHOOSE)))
    share = max(_KL_SHARE, wanted / len(usable))
    chosen = np.zeros(len(fit.role), bool)
    chosen[usable[np.random.default_rng(fit.config.seed).random(len(usable)) < share]] = True
    if chosen.sum() < fit.config.fitting.kl_batch:
        raise IncompatibleError(
            f"too little text: {int(chosen.sum())} tokens for KL training in steps of {fit.config.fitting.kl_batch};"
            " raise --max-tokens, or lower --kl-batch"
        )
    return chosen


def _measure(fit: Fit, lenses: dict[str, TunedLens], mask: np.ndarray) -> tuple[dict[str, list[float]], list[Tensor]]:
    """Each lens's mean KL by layer on the tokens in `mask` [T], and some of these tokens' vectors, [n, D] by layer."""
    sample: list[Tensor] = []

    def batches() -> Iterator[list[Tensor]]:
        for batch in fit.batches:
            if vectors := data.chosen_vectors(fit.run, batch, mask):
                if not sample:
                    sample.extend(v[:_ROUND_TRIP_VECTORS] for v in vectors)
                yield vectors

    with progress("measure", "tok", int(mask.sum())) as bar:
        kls = mean_kl(batches(), lenses, fit.model.logits, vocabulary=fit.vocabulary, watch=bar.update)
    return kls, sample


def _layers(
    fits: list[RidgeFit], lens: TunedLens, kls: dict[str, list[float]], sample: list[Tensor]
) -> tuple[LayerFit, ...]:
    """Results for the embedding (layer None), then for each block's output; the last has no translator."""
    found = []
    for i, kl_logit_lens in enumerate(kls["logit lens"]):
        back = round_trip(lens, sample[i], i - 1) if i else None
        layer = LayerFit(layer=i - 1 if i else None, translator=None, kl_logit_lens=kl_logit_lens, round_trip=back)
        if i < len(fits):
            trained = kls["KL-trained"][i] if "KL-trained" in kls else None
            layer = replace(layer, translator=i, kl_ridge=kls["ridge"][i], kl_trained=trained)
            layer = replace(layer, penalty=fits[i].penalty, r2=fits[i].r2, condition=condition(lens.weights[i]))
        found.append(layer)
    return tuple(found)
