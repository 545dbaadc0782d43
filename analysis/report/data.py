"""What `analyze` has written, read back for the figures and the report, and the sentences that state its findings.

`load_results` reads summary.json, layers.parquet, latents.parquet and, where it is there, redundancy.parquet from one
folder, and nothing else. Numbers stay
as they were written; whatever is not defined (null, NaN, infinite) is shown as an en dash, never as "NaN". The titles
that state a finding are made here, once, so that a PNG and the page say the same words. Nothing is computed that the
files do not hold, but medians, bin averages and 1 / rel_var_t.

Shapes: L layers, J live latents (those that fired at least once in the analysed tokens), B bins of a heat map.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from residscope.errors import IncompatibleError, ResidscopeError

if TYPE_CHECKING:
    from analysis.report.prompt import Prompts

SCHEMA_VERSION = 1
EN_DASH = "\N{EN DASH}"
NBSP = "\N{NO-BREAK SPACE}"
WEIGHTINGS = {
    "mass": "activation mass",
    "equal": "equal pairs (token, latent)",
    "latent": "equal latents",
}
"""The three weightings of the decomposition and what each counts as one."""

PARTS = {
    "within_token": "within a token",
    "between_tokens": "between tokens",
    "between_latents": "between latents",
}
"""The three parts of the total variance, in the order in which they are stacked."""

MAX_PAIRS = 20
"""Pairs of latents that the report lists."""

SCALARS = (
    *("latent", "count", "n_tokens", "total", "mean", "layer_mean", "layer_var", "layer_std"),
    *("within_token", "between_tokens", "entropy", "n_layers_active"),
)
OPTIONAL_SCALARS = ("context_overlap", "context_chance")
"""Columns of latents.parquet that an analysis may lack."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """One run of `analyze`."""

    summary: dict[str, Any]
    """summary.json as it is."""

    layers: dict[str, np.ndarray]
    """Columns of layers.parquet, float64 [L] each; NaN where the file has null."""

    latents: dict[str, np.ndarray]
    """Scalar columns of latents.parquet for the live latents, [J] each, sorted by latent; NaN for null.
    Those of `OPTIONAL_SCALARS` only where the file has them."""

    counts: np.ndarray
    """Firings by latent and layer, int64 [J, L]."""

    probs: np.ndarray
    """P(layer | latent), the share of the latent's activation mass at each layer, float64 [J, L]; rows sum to 1."""

    kinds: np.ndarray = field(default_factory=lambda: np.empty(0, object))
    """Kind of each live latent's profile, [J]; empty where the file has none."""

    prompts: "Prompts | None" = None
    """What `analyze --prompt` added; None if nothing."""

    pairs: list[dict[str, Any]] = field(default_factory=list)
    """The foremost near-parallel pairs of latents, at most `MAX_PAIRS`, as in redundancy.parquet."""

    examples: str = ""
    """Blocks of `analysis.report.examples`; empty where the folder has no examples."""

    @property
    def layer_numbers(self) -> list[int]:
        """The model's block indices of the L columns, from 0."""
        return [int(layer) for layer in self.summary["layer_numbers"]]

    def get(self, *keys: str) -> Any:
        """The value at a path of keys in the summary, or None where the path ends early."""
        value: Any = self.summary
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def number(self, *keys: str) -> float | None:
        """The number at a path of keys, or None where it is not there or not finite."""
        return finite(self.get(*keys))

    def interval(self, weighting: str, name: str) -> tuple[float, float] | None:
        """The 95 % interval of one number of the decomposition, or None."""
        return self.bounds("variance", weighting, name)

    def bounds(self, *keys: str) -> tuple[float, float] | None:
        """The 95 % interval of the number at a path of keys, which lies beside it under "ci95"; None without one."""
        bounds = self.get(*keys[:-1], "ci95", keys[-1])
        if not isinstance(bounds, (list, tuple)) or len(bounds) != 2:
            return None
        low, high = finite(bounds[0]), finite(bounds[1])
        return None if low is None or high is None else (low, high)

    @property
    def reference_ratio(self) -> float | None:
        """How many times the token-level variance the aggregate would be by the reference's formula: 1 / rel_var_t."""
        rel = self.number("variance", "mlsae_compat", "rel_var_t")
        return None if rel is None or rel <= 0 else 1 / rel


class HeatMap(NamedTuple):
    """P(layer | latent) with the live latents sorted by mean layer, averaged over bins of neighbours."""

    share: np.ndarray
    """float64 [L, B]: mean of P(layer | latent) over the latents of a bin."""

    n_latents: int
    """Live latents shown, J."""

    per_bin: float
    """Latents per bin, J / B (bins differ by at most one)."""

    top: float
    """End of the colour scale, exceeded by 1 cell in 200, so that a few sharp bins leave room for the rest."""


def load_results(out_dir: Path) -> Results:
    """Read the three files of `analyze` from `out_dir`.

    Raises ResidscopeError for a missing file, IncompatibleError for another schema_version.
    """
    import pyarrow

    for name in ("summary.json", "layers.parquet", "latents.parquet"):
        if not (out_dir / name).is_file():
            raise ResidscopeError(f"{out_dir} holds no {name}: the report is made from what `analyze --out` writes")
    summary = json.loads((out_dir / "summary.json").read_text(encoding="utf-8"))
    version = summary.get("schema_version")
    if version != SCHEMA_VERSION:
        raise IncompatibleError(
            f"{out_dir / 'summary.json'}: schema_version is {version}, this report reads {SCHEMA_VERSION}: "
            "run `analyze` again with this version"
        )
    try:
        return _load_tables(out_dir, summary)
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise IncompatibleError(f"{out_dir}: a table there is damaged ({reason}): run `analyze` again") from None


def _load_tables(out_dir: Path, summary: dict[str, Any]) -> Results:
    import pyarrow.parquet as pq

    from analysis.report.prompt import load_prompts

    layers = pq.read_table(out_dir / "layers.parquet")
    there = pq.read_schema(out_dir / "latents.parquet").names
    has_kinds = "profile" in there
    scalars = [*SCALARS, *(name for name in OPTIONAL_SCALARS if name in there)]
    columns = [*scalars, "counts", "probs", *(["profile"] if has_kinds else [])]
    latents = pq.read_table(out_dir / "latents.parquet", columns=columns)
    pairs = out_dir / "redundancy.parquet"
    live = np.asarray(latents["count"]) > 0
    n_layers = len(summary["layer_numbers"])

    def matrix(name: str) -> np.ndarray:
        values: Any = latents[name].combine_chunks()
        return np.asarray(values.flatten()).reshape(len(live), n_layers)[live]

    from analysis.report.examples import example_blocks

    return Results(
        examples=example_blocks(out_dir, np.asarray(latents["latent"].to_numpy())[live]),
        summary=summary,
        layers={name: np.asarray(layers[name].to_numpy(), dtype=np.float64) for name in layers.column_names},
        latents={name: np.asarray(latents[name].to_numpy())[live] for name in scalars},
        counts=matrix("counts"),
        probs=matrix("probs"),
        kinds=np.array(latents["profile"].to_pylist(), object)[live] if has_kinds else np.empty(0, object),
        prompts=load_prompts(out_dir),
        pairs=pq.read_table(pairs).slice(0, MAX_PAIRS).to_pylist() if pairs.is_file() else [],
    )


def heat_map(results: Results, max_bins: int = 480) -> HeatMap:
    """Sort the live latents by mean layer and average neighbours, so that at most `max_bins` columns remain.

    Averaging, not picking every n-th: each latent counts, and no pattern appears that the data does not have.
    """
    order = np.argsort(results.latents["layer_mean"], kind="stable")
    n_latents = len(order)
    n_bins = min(max_bins, n_latents)
    if n_bins == 0:
        return HeatMap(np.zeros((len(results.layer_numbers), 0)), 0, 0.0, 1.0)
    starts = np.arange(n_bins) * n_latents // n_bins
    sizes = np.diff(np.append(starts, n_latents))
    share = np.add.reduceat(results.probs[order], starts, axis=0) / sizes[:, None]
    return HeatMap(share.T, n_latents, n_latents / n_bins, float(np.quantile(share, 0.995)))


def finite(value: Any) -> float | None:
    """`value` as a float, or None where it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        return None
    return float(value) if math.isfinite(value) else None


def show(value: Any, digits: int = 3) -> str:
    """A number with `digits` significant digits and thousands separators; an en dash where there is none."""
    number = finite(value)
    if number is None:
        return EN_DASH
    if number == 0:
        return "0"
    exponent = math.floor(math.log10(abs(float(f"{number:.{digits - 1}e}"))))
    if not -4 <= exponent < 7:
        mantissa = f"{number / 10.0**exponent:.{digits - 1}f}"
        return f"{mantissa}\N{MULTIPLICATION SIGN}10^{exponent}".replace("-", "\N{MINUS SIGN}")
    return f"{number:,.{max(digits - 1 - exponent, 0)}f}".replace("-", "\N{MINUS SIGN}")


def integer(value: Any) -> str:
    """A count with thousands separators; an en dash where there is none."""
    number = finite(value)
    return EN_DASH if number is None else f"{round(number):,}"


def percent(value: Any) -> str:
    """A share as a percentage: whole numbers from 10 % on, two digits below."""
    number = finite(value)
    if number is None:
        return EN_DASH
    return f"{number * 100:.0f}{NBSP}%" if number >= 0.0995 or number == 0 else f"{show(number * 100, 2)}{NBSP}%"


def between(bounds: tuple[float, float] | None, digits: int = 3) -> str:
    """An interval as "a to b"; empty where there is none."""
    return "" if bounds is None else f"{show(bounds[0], digits)} to {show(bounds[1], digits)}"


def why_no_ratio(results: Results, weighting: str = "mass") -> str:
    """Why aggregate / token-level variance is not defined; empty where it is."""
    if results.number("variance", weighting, "aggregate_over_token") is not None:
        return ""
    if results.get("n_layers") == 1:
        return "only one layer was analysed, so there is nothing to vary"
    if len(results.counts) == 0:
        return "no latent fired in these tokens"
    if results.number("variance", weighting, "within_token") == 0:
        return "at every token each latent fires at one layer only, so the token-level variance is 0"
    return "summary.json holds no value for it"


def headline(results: Results) -> str:
    """The main finding in one plain sentence."""
    ratio = results.number("variance", "mass", "aggregate_over_token")
    if ratio is None:
        return f"Aggregate over token-level variance is not defined here: {why_no_ratio(results)}."
    return f"The variance of a latent's layer is {show(ratio)} times as large over all tokens as at a single token."


def variance_title(results: Results) -> str:
    """What the decomposition finds, by activation mass."""
    total = results.number("variance", "mass", "total")
    if not total:
        return "The layers of active latents do not vary in these tokens"
    shares = {name: percent((results.number("variance", "mass", name) or 0.0) / total) for name in PARTS}
    return (
        f"{shares['within_token']} of the layer variance lies within a token, "
        f"{shares['between_tokens']} between tokens, {shares['between_latents']} between latents"
    )


def ratio_title(results: Results) -> str:
    """Ours beside the reference's."""
    ratio, reference = results.number("variance", "mass", "aggregate_over_token"), results.reference_ratio
    ours = "not defined" if ratio is None else show(ratio)
    theirs = "gives none" if reference is None else f"reads {show(reference)}"
    return f"Aggregate over token-level variance: {ours}; the reference's formula {theirs}"


def layer_profile_title(results: Results) -> str:
    """What the heat map finds: how widely a typical live latent spreads."""
    n_live = len(results.counts)
    if n_live == 0:
        return "No latent fired in these tokens"
    median = float(np.median(results.latents["layer_std"]))
    return f"Half of the {n_live:,} live latents spread over {show(median, 2)} layers (s.d.) or more"


def reconstruction_title(results: Results) -> str:
    """What the reconstruction error finds: the mean over layers, and the baseline on held-out text."""
    fvu = results.number("reconstruction", "fvu")
    if fvu is None:
        return "The reconstruction error is not defined in these tokens"
    if results.get("split", "name") == "validation":
        beside = []
    else:
        beside = [("held-out text", results.number("validation_fvu"))]
    pca_k = integer(results.get("baseline", "pca", "k"))
    beside.append((f"PCA of {pca_k} components", results.number("baseline", "pca", "fvu")))
    known = "; ".join(f"{name} {percent(value)}" for name, value in beside if value is not None)
    return f"{percent(fvu)} of the variance is left unexplained" + (f" ({known})" if known else "")
