"""How often the 95 % intervals of `analyze` hold the truth: on samples drawn from a process whose truth is known.

    python benchmarks/bench_intervals.py [--json] [--stores 200] [--documents 20 60 300]

The process: a document has a topic, which says how often each latent is used in it, and a shift of the layers at which
latents are active; a latent has a centre and a width over the layers; a token has some latents of its document's topic,
each active where noise lets it. So tokens of a document are alike, and an interval over tokens would be too narrow.
The truth is that of 32,000 documents. Codes go straight into the sums: what reads and encodes
a store is not part of the question. For every number that has an interval, the share of samples whose interval holds
the truth should be near 0.95; 200 samples tell it to about 0.03. Then the same of a mean over documents that may be
negative, as delta cross-entropies, whose truth is 0 to 5 standard errors: on its own scale, and by its logarithm where
all replicates are positive, as those that are positive by nature have it.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from analysis.moments import VARIANCE_NAMES, WEIGHTINGS, LayerMoments, variances
from analysis.persistence import PAIR_WEIGHTINGS, PERSISTENCE_NAMES, persistence_numbers
from analysis.uncertainty import jackknife_intervals, leave_one_out, persistence_intervals, variance_intervals

N_LAYERS, N_LATENTS, N_TOPICS, PER_TOKEN = 8, 24, 6, 4
DOCUMENT_TOKENS = 24
TRUTH_SAMPLES, TRUTH_DOCUMENTS = 8, 4000


def main() -> None:
    parser = argparse.ArgumentParser(description="Coverage of the 95 % intervals on samples from a known process.")
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    parser.add_argument("--stores", type=int, default=200, help="samples")
    parser.add_argument("--documents", type=int, nargs="+", default=[20, 60, 300], help="documents of a sample")
    options = parser.parse_args()
    truth = numbers(
        LayerMoments.merged(
            [pooled(sample(np.random.default_rng(10**6 + i), TRUTH_DOCUMENTS)) for i in range(TRUTH_SAMPLES)]
        )
    )
    found: dict[str, dict[str, float]] = {}
    for n_documents in options.documents:
        coverage = cover(truth, n_documents, options.stores)
        shares = list(coverage.values())
        found[str(n_documents)] = {
            "coverage_min": min(shares),
            "coverage_mean": sum(shares) / len(shares),
            "coverage_max": max(shares),
        }
        print(f"{n_documents} documents, {options.stores} samples")
        for name, share in coverage.items():
            print(f"  {name:<32} {share:.3f}")
        print("  " + "  ".join(f"{name} {value:.3f}" for name, value in found[str(n_documents)].items()))
        for errors in (0, 0.5, 1, 2, 5):
            signed, positive = (near_zero(errors, n_documents, signed) for signed in (True, False))
            print(f"  a mean of {errors} standard errors: {signed:.3f}, by its logarithm {positive:.3f}")
    if options.json:
        each = list(found.values())
        keys = {
            "coverage_min": min(one["coverage_min"] for one in each),
            "coverage_max": max(one["coverage_max"] for one in each),
        }
        print(json.dumps({**keys, "by_documents": found}))


def cover(truth: dict[tuple[str, str], float], n_documents: int, n_samples: int) -> dict[str, float]:
    """The share of samples whose interval holds the truth, for each number."""
    hits = dict.fromkeys(truth, 0)
    for seed in range(n_samples):
        moments = sample(np.random.default_rng(seed), n_documents)
        for make in (variance_intervals, persistence_intervals):
            for weighting, intervals in make(moments).items():
                for name, interval in intervals.items():
                    value = truth[weighting, name]
                    hits[weighting, name] += interval is not None and interval.low <= value <= interval.high
    return {f"{weighting} {name}": count / n_samples for (weighting, name), count in hits.items()}


def near_zero(errors: float, n_documents: int, signed: bool) -> float:
    """The share of 2000 samples whose interval holds a mean over documents of so many standard errors."""
    truth = errors / np.sqrt(n_documents)
    x = np.random.default_rng(0).normal(truth, 1, (2000, n_documents))
    found = jackknife_intervals(x.mean(axis=1), x @ leave_one_out(n_documents) / (n_documents - 1), signed=signed)
    return float(np.mean([one is not None and one.low <= truth <= one.high for one in found]))


def pooled(moments: LayerMoments) -> LayerMoments:
    """The same sums in one document group."""
    whole = LayerMoments.zeros(range(N_LAYERS), N_LATENTS)
    whole.sums[:] = moments.sums.sum(axis=0)
    whole.histograms[:] = moments.histograms.sum(axis=0)
    whole.run_sums[:] = moments.run_sums.sum(axis=0)
    return whole


def sample(rng: np.random.Generator, n_documents: int) -> LayerMoments:
    """Sums of `n_documents` documents of the process, a group each."""
    process = np.random.default_rng(0)
    use = process.dirichlet(np.full(N_LATENTS, 0.3), N_TOPICS)  # [topics, M]
    centre, width = process.uniform(0, N_LAYERS - 1, N_LATENTS), process.uniform(0.5, 2.5, N_LATENTS)
    document = np.repeat(np.arange(n_documents), DOCUMENT_TOKENS)
    topic, shift = rng.integers(0, N_TOPICS, n_documents), rng.normal(0, 0.7, n_documents)
    draw = np.log(use + 1e-12)[topic[document]] + rng.gumbel(size=(len(document), N_LATENTS))
    latent = np.argsort(-draw, axis=1)[:, :PER_TOKEN]  # [T, PER_TOKEN], without replacement
    place = centre[latent] + shift[document][:, None] + rng.normal(0, 0.5, latent.shape)
    distance = np.arange(N_LAYERS)[None, :, None] - place[:, None, :]
    values = np.exp(-0.5 * (distance / width[latent][:, None, :]) ** 2) * rng.gamma(2.0, 0.5, distance.shape)
    values[values < 0.3] = 0.0
    moments = LayerMoments.zeros(range(N_LAYERS), N_LATENTS, range(n_documents))
    indices = np.broadcast_to(latent[:, None, :], values.shape)
    moments.add(values, indices, document)
    return moments


def numbers(moments: LayerMoments) -> dict[tuple[str, str], float]:
    """Every number that has an interval, by weighting and name."""
    pooled = moments.pooled()
    found = {(w, name): float(getattr(variances(pooled, w), name)) for w in WEIGHTINGS for name in VARIANCE_NAMES}
    histograms, shape = moments.histograms.sum(axis=0), moments.run_sums.sum(axis=0)
    for weighting in PAIR_WEIGHTINGS:
        means = persistence_numbers(histograms, shape, moments.layers, weighting)
        found |= {(weighting, name): float(getattr(means, name)) for name in PERSISTENCE_NAMES}
    return found


if __name__ == "__main__":
    main()
