"""The decomposition by its definition, on dense arrays and by numpy's own weighted means: what the sums of
`analysis.moments` must reproduce."""

import numpy as np
from numpy.typing import NDArray


def scatter(values: NDArray, indices: NDArray, n_latents: int) -> NDArray[np.float64]:
    """Sparse codes [T, L, k] -> dense activations [T, L, M], float64."""
    dense = np.zeros((*values.shape[:2], n_latents))
    np.put_along_axis(dense, indices, values.astype(np.float64), axis=-1)
    return dense


def spread_of(x: NDArray, weights: NDArray) -> tuple[float, float]:
    """Weighted mean and population variance."""
    mean = np.average(x, weights=weights)
    return float(mean), float(np.average((x - mean) ** 2, weights=weights))


def decompose(dense: NDArray[np.float64], layers: NDArray, weighting: str) -> dict[str, float]:
    """within_token, between_tokens, between_latents and total from P(l, j, t), straight from the definition of each
    expectation."""
    n_tokens, _, n_latents = dense.shape
    joint = dense.copy()  # unnormalised P(t, l, j)
    if weighting == "equal":
        mass = joint.sum(axis=1, keepdims=True)
        joint = np.divide(joint, mass, out=np.zeros_like(joint), where=mass > 0)
    if weighting == "latent":
        mass = joint.sum(axis=(0, 1), keepdims=True)
        joint = np.divide(joint, mass, out=np.zeros_like(joint), where=mass > 0)
    joint /= joint.sum()
    pairs = [(t, j, joint[t, :, j]) for t in range(n_tokens) for j in range(n_latents) if joint[t, :, j].sum() > 0]
    pair_mass = np.array([p.sum() for _, _, p in pairs])
    pair_mean, pair_var = np.array([spread_of(layers, p) for _, _, p in pairs]).T
    latent_of = np.array([j for _, j, _ in pairs])
    live = np.unique(latent_of)
    latent_mass = np.array([pair_mass[latent_of == j].sum() for j in live])
    inner = np.array([spread_of(pair_mean[latent_of == j], pair_mass[latent_of == j]) for j in live])
    profile = joint.sum(axis=(0, 2))
    return {
        "within_token": float(np.average(pair_var, weights=pair_mass)),
        "between_tokens": float(np.average(inner[:, 1], weights=latent_mass)),
        "between_latents": spread_of(inner[:, 0], latent_mass)[1],
        "total": spread_of(layers, profile)[1],
    }


def reference_ratios(dense: NDArray[np.float64], layers: NDArray | None = None) -> dict[str, float]:
    """The reference's formulas (docs/method.md), on dense arrays, all tokens one batch, layers numbered from 0."""
    layers = np.arange(dense.shape[1]) if layers is None else layers

    def v(p: NDArray) -> NDArray:  # layers first
        return np.tensordot(layers**2, p, 1) - np.tensordot(layers, p, 1) ** 2

    x = np.moveaxis(dense, 1, 0)  # [L, T, M]
    mass = x.sum(axis=0)
    p = np.divide(x, mass, out=np.zeros_like(x), where=mass > 0)
    tf, f, var = v(p).mean(), v(p.mean(axis=1)).mean(), v(p.mean(axis=(1, 2)))
    return {"exp_var_l_tf": tf, "exp_var_l_f": f, "var_l": float(var), "rel_var_f": f / var, "rel_var_t": tf / f}
