"""What a step's options are at each step of a run: constant, but for what warms up.

Pure functions of the plan and the step's number, so a resumed run needs to remember nothing of them.
"""

from dataclasses import replace

from train.objective.step import StepOptions
from train.objective.variants import variant_of
from train.resolve import RunPlan


def step_options(plan: RunPlan) -> StepOptions:
    """The options of a run's steps, warm-ups over."""
    return StepOptions(
        variant=variant_of(plan.sae_config),
        k=plan.k,
        aux_k=plan.aux_k,
        aux_coef=plan.aux_coef,
        product_dtype=plan.torch_dtype,
        tile_bytes=plan.tile_bytes,
        multi_topk=plan.multi_topk,
        sparsity_loss="penalty" if plan.sparsity_loss == "penalty" else "target",
        sparsity_coef=plan.sparsity_coef,
        bandwidth=plan.bandwidth,
    )


def options_at(options: StepOptions, plan: RunPlan, step: int) -> StepOptions:
    """Those of step number `step` (from 0)."""
    k = k_at(step, plan)
    coefficient = plan.sparsity_coef * sparsity_share(step, plan)
    if k == options.k and coefficient == options.sparsity_coef:
        return options
    return replace(options, k=k, sparsity_coef=coefficient)


def k_at(step: int, plan: RunPlan) -> int:
    """k falls (or rises) linearly from k_start to k over the first k_warmup_fraction of the steps."""
    warmup = round(plan.k_warmup_fraction * plan.steps)
    if plan.k_start is None or step >= warmup:
        return plan.k
    return plan.k_start + round((plan.k - plan.k_start) * step / warmup)


def sparsity_share(step: int, plan: RunPlan) -> float:
    """The sparsity term's coefficient rises linearly to its value over the first sparsity_warmup_fraction."""
    warmup = round(plan.sparsity_warmup_fraction * plan.steps)
    return (step + 1) / (warmup + 1) if step < warmup else 1.0
