"""What a step's options are at each step of a run: constant, but for what warms up.

Pure functions of the plan and the step's number, so a resumed run needs to remember nothing of them.
"""

from dataclasses import replace

from train.objective.variants import StepOptions, variant_of
from train.resolve import RunPlan


def step_options(plan: RunPlan) -> StepOptions:
    """The options of a run's steps once all warm-ups are over."""
    return StepOptions(
        variant=variant_of(plan.model),
        objective=plan.config.objective,
        k=plan.model.k,
        aux_k=plan.aux_k,
        sparsity_coef=plan.sparsity_coef,
        product_dtype=plan.torch_dtype,
        tile_bytes=plan.tile_bytes,
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
    k, k_start = plan.model.k, plan.config.objective.k_start
    warmup = round(plan.config.objective.k_warmup_fraction * plan.steps)
    if k_start is None or step >= warmup:
        return k
    return k_start + round((k - k_start) * step / warmup)


def sparsity_share(step: int, plan: RunPlan) -> float:
    """The sparsity term's coefficient rises linearly to its value over the first sparsity_warmup_fraction."""
    warmup = round(plan.config.objective.sparsity_warmup_fraction * plan.steps)
    return (step + 1) / (warmup + 1) if step < warmup else 1.0
