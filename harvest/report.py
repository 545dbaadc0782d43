"""What `harvest` prints on stdout: a few lines for people, or one JSON line.

What it does not do: compute anything; the numbers are those of `HarvestResult` and `Estimate`.
"""

import json

from harvest.estimate import Estimate
from harvest.run import HarvestResult
from residscope.console import counted, human_bytes, human_seconds


def print_result(result: HarvestResult | Estimate, *, as_json: bool) -> None:
    """Print a result; as JSON with the result's fields as keys, and "dry_run" in front."""
    if as_json:
        print(json.dumps({"dry_run": isinstance(result, Estimate), **result._asdict()}))
        return
    rows = _estimate_rows(result) if isinstance(result, Estimate) else _result_rows(result)
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")


def _result_rows(result: HarvestResult) -> list[tuple[str, str]]:
    if result.shards_written:
        speed = f", {result.tokens_per_second:,.0f} tokens/s" if result.tokens_per_second else ""
        run = f"{result.shards_written} of {counted(result.shards, 'shard')} in {human_seconds(result.seconds)}{speed}"
    else:
        run = f"nothing to do: the store was whole, {counted(result.shards, 'shard')}"
    return [
        ("store", f"{result.out} ({human_bytes(result.bytes)})"),
        ("model", f"{result.model} ({result.architecture}), layers {_ranges(result.layers)}, d_model {result.d_model}"),
        (
            "tokens",
            f"{result.tokens:,} of {counted(result.documents, 'document')}; {result.kept:,} kept for training and "
            "analysis",
        ),
        ("written", run),
    ]


def _estimate_rows(found: Estimate) -> list[tuple[str, str]]:
    available = "unknown" if found.tokens_available is None else f"about {found.tokens_available:,}"
    verdict = (
        "fits" if found.fits else "DOES NOT FIT: fewer --max-tokens, fewer --layers, --codec zstd, or another disk"
    )
    return [
        ("model", f"{found.model} ({found.architecture}), layers {_ranges(found.layers)}, d_model {found.d_model}"),
        ("compute", f"{found.dtype} on {found.device}, {found.batch_size} x {found.context_length} tokens a batch"),
        ("text", f"tokens available: {available}"),
        (
            "store",
            (
                f"{found.tokens:,} tokens x {found.bytes_per_token:,} bytes ({found.store_dtype}) ="
                f" {human_bytes(found.bytes)}"
            ),
        ),
        ("disk", f"{human_bytes(found.free_bytes)} free: {verdict}"),
        ("time", f"about {human_seconds(found.seconds)} at {found.tokens_per_second:,.0f} tokens/s (measured)"),
        ("", "nothing was written"),
    ]


def _ranges(layers: list[int]) -> str:
    """Ascending indices as ranges: 0-5,11."""
    groups: list[list[int]] = []
    for layer in layers:
        if groups and layer == groups[-1][-1] + 1:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return ",".join(f"{group[0]}-{group[-1]}" if len(group) > 1 else str(group[0]) for group in groups)
