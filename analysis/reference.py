"""The numbers of the reference implementation (tim-lawson/mlsae, `analysis/variances.py`), from the same sums.

p[l, t, j] = a / sum_l a, 0 where latent j is silent at token t; V(p) = sum_l l^2 p - (sum_l l p)^2 with the model's
layer numbers, from 0; exp_var_l_tf = mean_{t,j} V(p), exp_var_l_f = mean_j V(mean_t p), var_l = V(mean_{t,j} p). They
are called variances there but are not if a latent is silent: a silent token stays in the means as mass 0, so the p that
V gets do not sum to 1. The reference takes the ratios per batch of its own data loader and averages them; here all
tokens are one batch, because a number should not depend on a batch size, nor on the shards of a store. The difference
is small: on simulated activations, batches of 2,048 tokens gave a rel_var_t of 0.0917, all 9,563 0.0910.
Tested in test_moments.py.
"""

from analysis.moments import LayerMoments


def mlsae_compat(moments: LayerMoments) -> dict[str, float | None]:
    """What the reference implementation would report for these tokens, under its names.

    rel_var_f: exp_var_l_f / var_l. rel_var_t: exp_var_l_tf / exp_var_l_f, its share of token-level variance. None where
    the denominator is 0.
    """
    _, _, _, _, pairs, linear, spread, square = moments.pooled()
    cells = float(moments.n_tokens.sum())
    c = moments.centre
    first = (linear + c * pairs) / cells  # [M] sum_l l mean_t p
    second = (spread + square + 2 * c * linear + c * c * pairs) / cells  # [M] sum_l l^2 mean_t p
    exp_var_l_tf = float(spread.mean()) / cells
    exp_var_l_f = float((second - first**2).mean())
    var_l = float(second.mean() - first.mean() ** 2)
    return {
        "exp_var_l_tf": exp_var_l_tf,
        "exp_var_l_f": exp_var_l_f,
        "var_l": var_l,
        "rel_var_f": exp_var_l_f / var_l if var_l > 0 else None,
        "rel_var_t": exp_var_l_tf / exp_var_l_f if exp_var_l_f > 0 else None,
    }
