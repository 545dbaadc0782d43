"""What a finished run says: a few words for the terminal, and the same as plain values for `--json`."""

from typing import Any

from store.console import human_seconds
from train.loop import TrainResult


def summary(result: TrainResult) -> dict[str, Any]:
    """Plain values of a run, for JSON."""
    trained = {key: value for key, value in result.metrics.items() if key != "fvu_per_layer"}
    return {
        "checkpoint": str(result.checkpoint),
        "seconds": result.seconds,
        "plan": result.plan.to_dict(),
        "training": trained,
        "validation": None if result.validation is None else result.validation.metrics(),
    }


def describe(result: TrainResult) -> str:
    """A run in words."""
    plan, metrics, held_out = result.plan, result.metrics, result.validation
    lines = [
        f"{result.checkpoint}: {plan.n_latents} latents, k {plan.k}, after {metrics['step']} steps "
        f"({metrics['vectors']} vectors of {len(plan.layers)} layers) in {human_seconds(result.seconds)}",
        f"training: FVU {metrics['fvu']:.3f}, L0 {metrics['l0']:.1f}, {metrics['dead_fraction']:.1%} of latents dead",
    ]
    if held_out is None:
        lines.append("validation: no document was held out")
    else:
        worst = max(range(len(plan.layers)), key=held_out.fvu_per_layer.__getitem__)
        lines.append(
            f"validation on {held_out.tokens} tokens of held-out documents: FVU {held_out.fvu:.3f} (mean over layers; "
            f"worst {held_out.fvu_per_layer[worst]:.3f} at layer {plan.layers[worst]}), L0 {held_out.l0:.1f}"
        )
    return "\n".join(lines)
