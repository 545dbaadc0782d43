"""Made-up outputs of `analyze`, of any size, in the written schema: summary.json and its three tables.

The latents are drawn from five kinds of layer profile (early, late, persistent, narrow, bimodal) and fire as seldom
as real ones do; every number of the summary that can be computed from the table is computed from it, so the parts of
the variance add up. Nothing here was measured: the reconstruction errors are smooth curves.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

N_TOKENS = 30_214

DISTRIBUTIONS = ("n_layers_active", "run_length", "onset", "offset")
PERSISTENCE_NAMES = (
    *("n_layers_active", "onset", "offset", "run_length", "n_runs", "contiguity", "unbroken", "single_layer"),
    *("contiguity_multi", "unbroken_multi", "stays_on"),
)


def _profiles(rng: np.random.Generator, n_latents: int, n_layers: int) -> np.ndarray:
    """Layer profiles, [n_latents, n_layers], not normalised."""
    layer = np.arange(n_layers)
    kind = rng.choice(5, n_latents, p=[0.25, 0.2, 0.15, 0.25, 0.15])
    last = n_layers - 1
    centre = np.array([0, last, last / 2, 0, 0.1 * last])[kind]
    centre = np.where(kind == 3, rng.uniform(0, last, n_latents), centre)
    scale = np.array([0.1, 0.12, 0.8, 0.05, 0.08])[kind] * n_layers * rng.gamma(4, 0.25, n_latents)

    def bump(middle: np.ndarray) -> np.ndarray:
        return np.exp(-0.5 * ((layer - middle[:, None]) / (scale[:, None] + 0.2)) ** 2)

    return bump(centre) + (kind == 4)[:, None] * bump(np.full(n_latents, 0.85 * last))


def _variance(
    weight: np.ndarray, mean: np.ndarray, within: np.ndarray, between: np.ndarray, ci: bool
) -> dict[str, Any]:
    weight = weight / weight.sum()
    parts = {
        "within_token": weight @ within,
        "between_tokens": weight @ between,
        "between_latents": weight @ (mean - weight @ mean) ** 2,
    }
    parts["total"] = parts["within_token"] + parts["between_tokens"] + parts["between_latents"]
    parts["aggregate"] = parts["within_token"] + parts["between_tokens"]
    parts = {name: float(value) for name, value in parts.items()}
    parts["aggregate_over_token"] = _ratio(parts["aggregate"], parts["within_token"])
    known = {name: value for name, value in parts.items() if value is not None}
    return parts | {"ci95": {name: [0.97 * v, 1.04 * v] for name, v in known.items()} if ci else {}}


def _ratio(above: float, below: float) -> float | None:
    return float(above / below) if below else None


def _persistence(rng: np.random.Generator, n_layers: int, ci: bool) -> dict[str, Any]:
    """Made-up means over pairs, and distributions that sum to 1."""
    means = {name: float(rng.uniform(0.1, 1)) for name in PERSISTENCE_NAMES}
    shares = {name: rng.dirichlet(np.ones(n_layers)).tolist() for name in DISTRIBUTIONS}
    return {
        **means,
        "ci95": {name: [0.98 * value, 1.05 * value] for name, value in means.items()} if ci else {},
        "distributions": shares,
    }


def _null(rng: np.random.Generator, variance: dict[str, Any], persistence: dict[str, Any]) -> dict[str, Any]:
    """A made-up null in the schema, its ratios computed."""
    result: dict[str, Any] = {"variance": {}, "persistence": {}, "ratio": {"variance": {}, "persistence": {}}}
    for part, observed, weightings in (
        ("variance", variance, ("mass", "equal", "latent")),
        ("persistence", persistence, ("mass", "equal")),
    ):
        for weighting in weightings:
            numbers = {n: v for n, v in observed[weighting].items() if n not in ("ci95", "distributions")}
            null = {n: None if v is None else float(v * rng.uniform(0.5, 3)) for n, v in numbers.items()}
            bounds = observed[weighting]["ci95"]
            result[part][weighting] = null
            result["ratio"][part][weighting] = {
                **{n: numbers[n] / v if v else None for n, v in null.items()},
                "ci95": {n: [b / v for b in bounds[n]] for n, v in null.items() if v and n in bounds},
            }
    result["distributions"] = {w: persistence[w]["distributions"] for w in ("mass", "equal")}
    return result


DOWNSTREAM = ("delta_ce", "kl", "loss_recovered_mean", "loss_recovered_zero")


def _downstream_columns(depth: float, ci: bool) -> dict[str, float | None]:
    values = {"delta_ce": 0.4 - 0.5 * depth, "kl": 0.3 + depth}
    values |= {"loss_recovered_mean": 0.9 - 0.2 * depth, "loss_recovered_zero": 0.95 - 2 * depth}
    bounds = {
        f"{name}_{end}": value + shift if ci else None
        for name, value in values.items()
        for end, shift in (("low", -0.05), ("high", 0.07))
    }
    others = {f"{kind}_ablation_{name}": 5.0 + depth for kind in ("mean", "zero") for name in ("delta_ce", "kl")}
    return {**values, **bounds, **others}


def write_results(
    out_dir: Path,
    *,
    n_layers: int = 30,
    n_latents: int = 9216,
    dead_fraction: float = 0.24,
    ci: bool = True,
    seed: int = 0,
    change: Callable[[dict[str, Any]], object] | None = None,
) -> Path:
    """Write the files into `out_dir` and return it; `change` may edit the summary before it is written."""
    rng = np.random.default_rng(seed)
    latents = _draw_latents(rng, n_layers, n_latents, dead_fraction)
    kinds = _write_latents(out_dir, latents)
    _write_pairs(out_dir, n_latents)
    rows = _layer_rows(rng, latents, ci)
    pq.write_table(pa.Table.from_pylist(rows), out_dir / "layers.parquet")
    summary = _summary(rng, latents, kinds, rows, ci)
    if change is not None:
        change(summary)
    (out_dir / "summary.json").write_text(json.dumps(summary, indent=2))
    return out_dir


class _Latents(NamedTuple):
    """Made-up latents: M latents, L layers."""

    counts: np.ndarray  # [M, L]
    totals: np.ndarray  # [M, L] activation mass
    probs: np.ndarray  # [M, L] totals over their sum; 0 for a dead latent
    mean: np.ndarray  # [M] mean layer
    var: np.ndarray  # [M] variance of the layer
    share: np.ndarray  # [M] the part of it that lies within a token
    n_tokens: np.ndarray  # [M]
    entropy: np.ndarray  # [M]

    @property
    def live(self) -> np.ndarray:
        return self.counts.sum(1) > 0


def _draw_latents(rng: np.random.Generator, n_layers: int, n_latents: int, dead_fraction: float) -> _Latents:
    layer = np.arange(n_layers, dtype=np.float64)
    rate = _profiles(rng, n_latents, n_layers) * rng.lognormal(0, 1.5, (n_latents, 1))
    rate[rng.random(n_latents) < dead_fraction] = 0
    rate *= 30 * N_TOKENS * n_layers / max(rate.sum(), 1)
    counts = np.minimum(rng.poisson(rate), N_TOKENS)
    totals = counts * rng.gamma(6, 0.25, (n_latents, n_layers))
    count, total = counts.sum(1), totals.sum(1)
    live = count > 0
    probs = np.divide(totals, total[:, None], out=np.zeros_like(totals), where=live[:, None])
    mean = probs @ layer
    var = np.maximum(probs @ layer**2 - mean**2, 0)
    share = rng.beta(4, 4.5, n_latents)
    n_tokens = np.minimum(np.ceil(count / rng.uniform(2, 8, n_latents)), N_TOKENS).astype(np.int64)
    entropy = -(probs * np.log2(np.where(probs > 0, probs, 1))).sum(1)
    return _Latents(counts, totals, probs, mean, var, share, n_tokens, entropy)


def _write_latents(out_dir: Path, latents: _Latents) -> np.ndarray:
    """Write latents.parquet; returns each latent's kind, [M]."""
    counts, totals, probs, mean, var, share, n_tokens, entropy = latents
    n_latents, n_layers = counts.shape
    count, total, live = counts.sum(1), totals.sum(1), latents.live

    def nullable(values: np.ndarray) -> pa.Array:
        return pa.array(values, mask=~live)

    def lists(values: np.ndarray) -> pa.Array:
        offsets = np.arange(0, values.size + 1, n_layers, dtype=np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.ravel()))

    columns = {
        "latent": pa.array(np.arange(n_latents)),
        "count": pa.array(count),
        "n_tokens": pa.array(n_tokens),
        "total": pa.array(total),
        "mean": nullable(total / np.maximum(count, 1)),
        "layer_mean": nullable(mean),
        "layer_var": nullable(var),
        "layer_std": nullable(np.sqrt(var)),
        "within_token": nullable(var * share),
        "between_tokens": nullable(var * (1 - share)),
        "entropy": nullable(entropy),
        "n_layers_active": pa.array((counts > 0).sum(1)),
        "counts": lists(counts),
        "totals": lists(totals),
        "means": lists(totals / np.maximum(counts, 1)),
        "probs": lists(probs),
    }
    kinds = np.array(["early", "middle", "late"])[np.minimum((mean * 3 / n_layers).astype(int), 2)].astype(object)
    kinds[2**entropy >= 2 / 3 * n_layers] = "persistent"
    kinds[~live] = None
    columns["profile"] = pa.array(kinds.tolist(), pa.string())
    pq.write_table(pa.table(columns), out_dir / "latents.parquet")
    return kinds


def _write_pairs(out_dir: Path, n_latents: int) -> None:
    pairs = [
        {"latent_a": a, "latent_b": a + 1, "cosine": 0.99 - 0.001 * a, "overlap": 0.01 * a, "redundant": a < 10}
        | {"layer_mean_a": 1.25, "layer_mean_b": 2.5}
        for a in range(min(30, n_latents - 1))
    ]
    pq.write_table(pa.Table.from_pylist(pairs), out_dir / "redundancy.parquet")


def _layer_rows(rng: np.random.Generator, latents: _Latents, ci: bool) -> list[dict[str, Any]]:
    """Rows of layers.parquet."""
    counts, totals = latents.counts, latents.totals
    n_layers = counts.shape[1]
    layer = np.arange(n_layers, dtype=np.float64)
    depth = layer / max(n_layers - 1, 1)
    fvu = 0.16 + 0.2 * np.sin(np.pi * depth**0.8) + 0.05 * depth + rng.normal(0, 0.006, n_layers)
    pca = _pca(n_layers)
    norm = np.exp(1 + 5 * depth)
    rows = [
        {
            "layer": i,
            "fvu": fvu[i],
            "mse": fvu[i] * norm[i] ** 2 / 576,
            "l0": 29.5 + 2 * np.sin(3 * depth[i]),
            "mean_norm": norm[i],
            "cosine_to_next": None if i == n_layers - 1 else 0.82 + 0.14 * np.sin(np.pi * depth[i]),
            "n_vectors": N_TOKENS,
            "active_latents": int((counts[:, i] > 0).sum()),
            "mass_share": totals[:, i].sum() / max(totals.sum(), 1),
            "validation_fvu": fvu[i] + 0.02 + 0.02 * depth[i],
            "pca_fvu": pca[i],
            "fvu_low": 0.98 * fvu[i] if ci else None,
            "fvu_high": 1.03 * fvu[i] if ci else None,
            **_downstream_columns(depth[i], ci),
        }
        for i in range(n_layers)
    ]
    return [{name: value.item() if hasattr(value, "item") else value for name, value in row.items()} for row in rows]


def _pca(n_layers: int) -> np.ndarray:
    return 0.42 + 0.28 * np.sin(np.pi * (np.arange(n_layers) / max(n_layers - 1, 1)) ** 0.7)


def _variances(latents: _Latents, ci: bool) -> dict[str, Any]:
    """The decomposition under three weightings, and the reference's numbers."""
    _, totals, probs, mean, var, share, n_tokens, _ = latents
    n_latents, live, total = len(mean), latents.live, totals.sum(1)
    layer = np.arange(probs.shape[1], dtype=np.float64)
    active = n_tokens / N_TOKENS
    compat_token, second = np.mean(active * var * share), active * (probs @ layer**2)
    compat_latent = np.mean(second - (active * mean) ** 2)
    variance = {
        name: _variance(weight[live], mean[live], (var * share)[live], (var * (1 - share))[live], ci)
        for name, weight in (("mass", total), ("equal", n_tokens.astype(float)), ("latent", np.ones(n_latents)))
    }
    compat: dict[str, Any] = {
        "exp_var_l_tf": float(compat_token),
        "exp_var_l_f": float(compat_latent),
        "var_l": float(second.mean() - np.mean(active * mean) ** 2),
    }
    compat["rel_var_f"] = _ratio(compat["exp_var_l_f"], compat["var_l"])
    compat["rel_var_t"] = _ratio(compat["exp_var_l_tf"], compat["exp_var_l_f"])
    return variance | {"mlsae_compat": compat}


def _provenance(n_layers: int, n_latents: int) -> dict[str, Any]:
    return {
        "store": {
            "name": "acts.zarr",
            "content_hash": "9f3c2a7e51b84d06a1c2d3e4f5061728",
            "config_hash": "ab12cd34ef56ab12cd34ef56ab12cd34",
            "model": "HuggingFaceTB/SmolLM2-135M",
            "revision": None,
            "architecture": "LlamaForCausalLM",
            "dataset": "pydoc",
            "context_length": 512,
            "lens": None,
            "stored_dtype": "bfloat16",
            "n_tokens": 32_768,
            "layers": list(range(n_layers)),
        },
        "sae": {
            "name": "ckpt.pt",
            "n_latents": n_latents,
            "k": 32,
            "d_model": 576,
            "expansion_factor": n_latents / 576,
            "trained_tokens": 28_703,
            "store_content_hash": "9f3c2a7e51b84d06a1c2d3e4f5061728",
        },
        "analysis": {
            "dtype": "float32",
            "split": "all",
            "max_tokens": None,
            "seed": 0,
            "versions": {"residscope": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "numpy": "2.3.0"},
        },
    }


def _summary(
    rng: np.random.Generator, latents: _Latents, kinds: np.ndarray, rows: list[dict[str, Any]], ci: bool
) -> dict[str, Any]:
    """summary.json."""
    n_latents, n_layers = latents.counts.shape
    live, total, pca = latents.live, latents.totals.sum(1), _pca(n_layers)
    variance = _variances(latents, ci)
    validation = [row["validation_fvu"] for row in rows]
    persistence: dict[str, Any] = {w: _persistence(rng, n_layers, ci) for w in ("mass", "equal")}
    persistence["n_pairs"] = int(latents.n_tokens.sum())
    return {
        "schema_version": 1,
        "provenance": _provenance(n_layers, n_latents),
        "split": {
            "name": "all",
            "n_tokens": N_TOKENS,
            "n_documents": 412,
            "n_validation_tokens": 1_511,
            "trained_on": "some",
            "text": "30,214 kept tokens of 412 documents: every kept token of the store; "
            "the SAE was trained on 28,703 of them.",
        },
        "convergence": {
            "last_quarter": {"steps": 200, "fvu": -0.08, "ratio": -0.12, "stays_on": 0.01, "settled": False},
            "text": "Not settled: over the last 200 steps of the training the ratio moved by -12.0% and FVU by -8.0%.",
            "curve": [
                {"step": 100 * i, "vectors": 204_800 * i, "fvu": 0.3 - 0.02 * i, "ratio": 1.9, "stays_on": 0.8}
                for i in (2, 4)
            ],
        },
        "warnings": ["95 % of these tokens were trained on: use --split validation for held-out numbers."],
        "n_tokens": N_TOKENS,
        "n_layers": n_layers,
        "n_latents": n_latents,
        "layer_numbers": list(range(n_layers)),
        "latents": {"active": int(live.sum()), "dead": int((~live).sum())},
        "reconstruction": {
            **{name: float(np.mean([row[name] for row in rows])) for name in ("fvu", "mse", "l0")},
            "ci95": {name: [0.1, 0.9] for name in ("fvu", "mse", "l0")} if ci else {},
        },
        "layers": rows,
        "variance": variance,
        "persistence": persistence,
        "nulls": {
            "seed": 0,
            "chunk_tokens": 256,
            **{name: _null(rng, variance, persistence) for name in ("layers_permuted", "tokens_permuted")},
        },
        "profiles": {
            kind: {"latents": int((kinds == kind).sum()), "mass_share": float(total[kinds == kind].sum() / total.sum())}
            if total.sum()
            else {"latents": 0, "mass_share": 0.0}
            for kind in ("early", "middle", "late", "persistent", "bimodal")
        },
        "redundancy": {
            "mmcs": 0.41,
            "cosine_threshold": 0.9,
            "overlap_threshold": 0.1,
            "parallel_pairs": 123,
            "redundant_pairs": 45,
            "redundant_latents": 67,
        },
        "uncertainty": {
            "method": "jackknife over groups of whole documents",
            "n_groups": 100,
            "n_documents": 412,
            "n_replicates": 1000,
        }
        if ci
        else None,
        "transformer": {"reason": None, "seconds": 1.5},
        "downstream": {
            "tokens": "validation",
            "n_tokens": 512,
            "n_documents": 9,
            "true_ce": 2.81,
            **{name: float(np.mean([row[name] for row in rows])) for name in DOWNSTREAM},
            "ci95": {name: [0.1, 0.9] for name in DOWNSTREAM} if ci else {},
        },
        "latent_logits": {
            "norm_folded": True,
            "unembedding_cosine": 0.31,
            "unembedding_chance": 0.2,
            "unembedding_chance_99": 0.25,
            "above_chance": 12,
            "embedding_cosine": 0.27,
            "embedding_chance": 0.19,
        },
        "validation_fvu": float(np.mean(validation)),
        "validation": {
            "n_tokens": 1_511,
            "n_documents": 20,
            "fvu": float(np.mean(validation)),
            "fvu_per_layer": validation,
        },
        "baseline": {
            "pca": {
                "k": 32,
                "fvu": float(pca.mean()),
                "fvu_per_layer": pca.tolist(),
                "n_train_vectors": 28_703 * n_layers,
                "n_validation_vectors": 1_511 * n_layers,
            }
        },
        "seconds": 21.3,
    }
