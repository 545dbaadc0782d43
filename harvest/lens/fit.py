"""Fit a tuned lens, end to end: vectors from a store or from the model, ridge translators, KL training, measurement,
and the lens's folder, made whole or not at all.

How: one pass over the text takes the Gram sums of every translator (lens_ridge.py); then, if asked for, KL training
from there or from zero on a random part of the same tokens (lens_kl.py); then both are made invertible and measured on
documents that took no part (lens_measure.py), always through the model itself. Everything is written into the folder
`OUT.fitting`, which is renamed last. What it does not do: continue a fit that was stopped, or print its result.

Shapes: L = n_layers translators, D = d_model; translator i takes the input of block i.
"""

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from harvest.lens import kl as lens_kl
from harvest.lens.config import FitLensConfig
from harvest.lens.data import (
    Part,
    Reader,
    Span,
    measured_tokens,
    model_reader,
    parts,
    shuffled,
    span_tokens,
    spans,
    store_reader,
)
from harvest.lens.files import write_lens
from harvest.lens.measure import condition, limit_condition, mean_kl, round_trip
from harvest.lens.result import FitResult, LayerFit
from harvest.lens.ridge import GramSums, RidgeFit, fit_ridge
from harvest.lens.translators import TunedLens
from harvest.model.checks import check_logits, check_model, refuse_other_weights
from harvest.model.load import LoadedModel, load_model
from harvest.run import tokenise
from harvest.settings import TORCH_DTYPES, Settings, resolve
from harvest.text.sources import open_sources
from residscope.console import human_bytes, progress
from residscope.destinations import held_alone
from residscope.errors import IncompatibleError, ResidscopeError, UsageError
from store.activations import ActivationStore
from store.arrays import TokenTable
from store.files import sync
from store.folder import refuse_inside_store

_WINDOW_BYTES = 512 << 20
_ROUND_TRIP_VECTORS = 512
_KL_SHARE = 0.25
"""At least this share of a span's tokens goes into KL training, so that forward passes stay the smaller part of it."""


class Translators(NamedTuple):
    """All translators of a lens."""

    weights: Tensor
    """float32 [L, D, D]."""
    biases: Tensor
    """float32 [L, D]."""


class Text(NamedTuple):
    """What the fit reads."""

    tokens: TokenTable
    """The tokens."""
    part: np.ndarray
    """What each is for, `Part` [T]."""
    spans: list[Span]
    """Its sequences, in groups."""
    read: Reader
    """Gives the vectors of a span."""
    run: Reader
    """The same, by running the model, whether or not there is a store."""


def fit_lens(config: FitLensConfig) -> FitResult:
    """Fit, measure and write a lens.

    Raises `UsageError` for options that cannot work, `IncompatibleError` where the store is of another model, has gone
    through a lens or lacks layers, `ResidscopeError` for anything else that the user can act on.
    """
    _refuse_existing(config.out)
    store = None if config.store is None else _open_store(config.store)
    settings = resolve(config.for_harvest())
    for note in settings.notes:
        print(note, file=sys.stderr)
    if store is not None:
        refuse_other_weights(settings.spec, store)
        tokens = store.tokens
    else:
        tokens, _ = tokenise(settings, open_sources(config.for_harvest()), config.max_tokens)
    part = parts(tokens, config.validation_fraction, config.seed)
    _require_tokens(part, settings.d_model)
    building = config.out.with_name(config.out.name + ".fitting")
    building.mkdir(parents=True, exist_ok=True)
    with held_alone(building, config.out):
        _refuse_existing(config.out)  # A fit that ran beside this one may have just ended.
        try:
            for left in building.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            model = load_model(
                settings.spec, dtype=TORCH_DTYPES[settings.dtype], device=settings.device, tokenizer=settings.tokenizer
            )
            text = _text(model, store, tokens, part)
            saved, result = _fit(config, settings, model, text)
            write_lens(building, model, *saved, extra={"fit.json": {**result.to_json(), "options": _options(config)}})
            building.rename(config.out)
            sync(config.out.absolute().parent)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
    return result


def _refuse_existing(out: Path) -> None:
    refuse_inside_store(out)
    if out.exists():
        raise UsageError(f"--out {out} exists already; it is left alone. Choose another, or remove it yourself")


def _open_store(path: Path) -> ActivationStore:
    """The store, which must hold every layer as the model gave it."""
    store = ActivationStore.open(path)
    meta = store.meta
    if meta.lens is not None:
        raise IncompatibleError(
            f"--store {path} went through lens {meta.lens.get('id')!r}: a lens is fitted on the model's own vectors;"
            " give a store that was harvested without --lens"
        )
    if meta.n_layers != meta.n_model_layers:
        raise IncompatibleError(
            f"--store {path} holds {meta.n_layers} of the model's {meta.n_model_layers} layers: a lens needs them all;"
            " give a store that was harvested without --layers"
        )
    return store


def _require_tokens(part: np.ndarray, d_model: int) -> None:
    """Refuse where no regression is to be had, or nothing to choose or measure on."""
    needed = {Part.FIT: 2 * d_model, Part.CHOOSE: 1, Part.HELD_OUT: 1}
    for kind, least in needed.items():
        found = int((part == kind).sum())
        if found < least:
            what = {Part.FIT: "to fit on", Part.CHOOSE: "to choose the penalty on", Part.HELD_OUT: "to measure on"}[
                kind
            ]
            raise IncompatibleError(
                f"too little text: {found} kept tokens {what}, d_model {d_model} needs at least {least}; give more"
                " documents, or raise --max-tokens"
            )


def _text(model: LoadedModel, store: ActivationStore | None, tokens: TokenTable, part: np.ndarray) -> Text:
    all_spans = spans(tokens.position, span_tokens(model.n_layers, model.d_model))
    first = all_spans[0]
    check_logits(model, torch.from_numpy(tokens.token_id[: first.length].astype(np.int64))[None])
    run = model_reader(model, tokens.token_id)
    if store is None:
        return Text(tokens, part, all_spans, run, run)
    check_model(store, model, None)
    return Text(tokens, part, all_spans, store_reader(store, model), run)


def _fit(config: FitLensConfig, settings: Settings, model: LoadedModel, text: Text) -> tuple[Translators, FitResult]:
    """All the work between reading and writing."""
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal began
        seconds[name] = time.perf_counter() - began
        began = time.perf_counter()

    fits, means, ridge = _ridge(model, text, config.max_condition)
    lap("ridge")
    lenses = {"ridge": ridge}
    if config.method == "kl":
        lenses["KL-trained"] = _trained(config, settings, model, text, ridge, means)
        lap("KL training")
    saved = list(lenses)[-1]
    kls, n_measured, n_documents, sample = _measure(config, settings, model, text, lenses)
    layers = _layers(model, fits, lenses[saved], kls, sample)
    lap("measuring")
    used = np.isin(text.part, (Part.FIT, Part.CHOOSE))
    return lenses[saved], FitResult(
        out=str(config.out),
        model=settings.spec.name,
        architecture=model.architecture,
        saved=saved,
        init=config.init if config.method == "kl" else None,
        fit_tokens=int(used.sum()),
        fit_documents=len(np.unique(text.tokens.document[used])),
        kl_tokens=config.kl_steps * config.kl_batch if config.method == "kl" else 0,
        kl_steps=config.kl_steps if config.method == "kl" else 0,
        held_out_tokens=n_measured,
        held_out_documents=n_documents,
        seconds=seconds,
        layers=layers,
    )


def _ridge(model: LoadedModel, text: Text, max_condition: float) -> tuple[list[RidgeFit], Tensor, Translators]:
    """The ridge fits, the inputs' means [L, D], and the translators, made invertible."""
    n_layers, d_model = model.n_layers, model.d_model
    print(
        f"host memory for Gram sums: {human_bytes(2 * n_layers * 2 * d_model**2 * 8)}, for vectors: about"
        f" {human_bytes(2 * span_tokens(n_layers, d_model) * (n_layers + 1) * d_model * 4)}",
        file=sys.stderr,
    )
    sums = {kind: [GramSums(d_model, model.device) for _ in range(n_layers)] for kind in (Part.FIT, Part.CHOOSE)}
    with progress("ridge", "tok", len(text.part)) as bar:
        for span in text.spans:
            vectors = text.read(span)
            for kind, of_kind in sums.items():
                rows = torch.from_numpy(np.flatnonzero(text.part[span.start : span.stop] == kind)).to(model.device)
                last = vectors[-1][rows]
                for i, gram in enumerate(of_kind):
                    gram.add(vectors[i][rows], last)
            bar.update(span.stop - span.start)
    # A product that overflowed stands in the sums for good; the factorisations below would only fail on it.
    if not all(bool(gram.xx.isfinite().all() and gram.xr.isfinite().all()) for of in sums.values() for gram in of):
        raise ResidscopeError(f"{model.spec.name}: its vectors are not all finite; try --dtype float32")
    fits: list[RidgeFit] = []
    means: list[Tensor] = []
    for fit, choose in zip(sums[Part.FIT], sums[Part.CHOOSE], strict=True):
        found = fit_ridge(fit, choose)
        fits.append(limit_condition_of(found, fit.mean_x, max_condition))
        means.append(fit.mean_x.float())
    stacked = Translators(
        torch.stack([found.weight.float() for found in fits]), torch.stack([found.bias.float() for found in fits])
    )
    return fits, torch.stack(means), stacked


def limit_condition_of(found: RidgeFit, mean: Tensor, limit: float) -> RidgeFit:
    """A ridge fit with its translator made invertible."""
    weight, bias = limit_condition(found.weight, found.bias, mean, limit)
    return found._replace(weight=weight, bias=bias)


def _trained(
    config: FitLensConfig, settings: Settings, model: LoadedModel, text: Text, ridge: Translators, means: Tensor
) -> Translators:
    """The KL-trained translators, made invertible."""
    start = ridge if config.init == "ridge" else Translators(*map(torch.zeros_like, ridge))
    weights, biases = start.weights.clone(), start.biases.clone()
    wanted = config.kl_steps * config.kl_batch
    window = _WINDOW_BYTES // ((model.n_layers + 1) * model.d_model * 4)
    usable = np.flatnonzero(np.isin(text.part, (Part.FIT, Part.CHOOSE)))
    chosen = np.zeros(len(text.part), bool)
    share = max(_KL_SHARE, wanted / len(usable))
    chosen[usable[np.random.default_rng(config.seed).random(len(usable)) < share]] = True
    if chosen.sum() < config.kl_batch:
        raise IncompatibleError(
            f"too little text: {int(chosen.sum())} tokens for KL training in steps of {config.kl_batch}; raise"
            " --max-tokens, or lower --kl-batch"
        )
    batches = shuffled(
        text.read,
        text.spans,
        chosen,
        batch=config.kl_batch,
        steps=config.kl_steps,
        seed=config.seed,
        window=min(window, wanted),
    )
    with progress("KL training", "step", config.kl_steps) as bar:

        def show(step: lens_kl.Step) -> None:
            bar.set_postfix_str(f"mean KL {sum(step.kl) / len(step.kl):.3f}", refresh=False)
            bar.update(1)

        lens_kl.train(
            weights,
            biases,
            batches,
            model.logits,
            vocabulary=settings.vocabulary,
            steps=config.kl_steps,
            lr=config.first_lr,
            weight_decay=config.weight_decay,
            after_step=show,
        )
    for i in range(model.n_layers):
        if not bool(weights[i].isfinite().all() and biases[i].isfinite().all()):
            raise ResidscopeError(f"KL training of translator {i} diverged; try a lower --lr than {config.first_lr:g}")
        weight, bias = limit_condition(weights[i].double(), biases[i].double(), means[i].double(), config.max_condition)
        weights[i], biases[i] = weight, bias
    return Translators(weights, biases)


def _measure(
    config: FitLensConfig, settings: Settings, model: LoadedModel, text: Text, lenses: dict[str, Translators]
) -> tuple[dict[str, list[float]], int, int, list[Tensor]]:
    """Mean KL by lens and layer; tokens and documents measured on; and some of the vectors."""
    mask = measured_tokens(text.tokens.position, text.part == Part.HELD_OUT, config.eval_tokens, config.seed)
    sample: list[Tensor] = []

    def batches() -> Iterator[list[Tensor]]:
        for span in text.spans:
            rows = torch.from_numpy(np.flatnonzero(mask[span.start : span.stop]))
            if len(rows):
                vectors = [v[rows.to(v.device)] for v in text.run(span)]
                if not sample:
                    sample.extend(v[:_ROUND_TRIP_VECTORS] for v in vectors)
                yield vectors

    with progress("measure", "tok", int(mask.sum())) as bar:
        kls, n = mean_kl(batches(), lenses, model.logits, vocabulary=settings.vocabulary, watch=bar.update)
    return kls, n, len(np.unique(text.tokens.document[mask])), sample


def _layers(
    model: LoadedModel, fits: list[RidgeFit], saved: Translators, kls: dict[str, list[float]], sample: list[Tensor]
) -> tuple[LayerFit, ...]:
    lens = TunedLens(saved.weights, saved.biases)
    found = []
    for i in range(model.n_layers + 1):
        has = i < model.n_layers
        found.append(
            LayerFit(
                layer=i - 1 if i else None,
                translator=i if has else None,
                kl_logit_lens=kls["logit lens"][i],
                kl_ridge=kls["ridge"][i] if has else None,
                kl_trained=kls["KL-trained"][i] if has and "KL-trained" in kls else None,
                penalty=fits[i].penalty if has else None,
                r2=fits[i].r2 if has else None,
                condition=condition(saved.weights[i]) if has else None,
                round_trip=round_trip(lens, sample[i], i - 1) if i else None,
            )
        )
    return tuple(found)


def _options(config: FitLensConfig) -> dict[str, Any]:
    names = (name for name in config.__dataclass_fields__ if name not in ("out", "json", "store"))
    return {name: getattr(config, name) for name in names} | {"store": config.store and config.store.name}
