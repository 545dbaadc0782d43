"""The names of the files in the folder that an analysis writes. They get there together (`residscope.destinations`),
summary.json last: a folder without summary.json holds no whole analysis."""

import contextlib
import tomllib
from pathlib import Path

from analysis.config import AnalyzeConfig
from residscope.errors import UsageError

SUMMARY, CONFIG, REPORT = "summary.json", "analyze.config.toml", "report.html"
LATENTS, LAYERS, REDUNDANCY = "latents.parquet", "layers.parquet", "redundancy.parquet"
LATENT_LOGITS, EXAMPLES, HISTOGRAMS = "latent_logits.parquet", "examples.parquet", "histograms.parquet"
PROMPT_JSON, PROMPT_TABLE = "prompt.json", "prompt.parquet"
"""What `analyze --prompt` adds to an analysis."""

FIGURES = ("layer_profile", "variance", "reconstruction", "downstream")
"""Of each a PNG and an SVG, which `analysis.report.page` may write beside report.html."""

FILES = {
    *(SUMMARY, LATENTS, LAYERS, CONFIG, REDUNDANCY, LATENT_LOGITS, EXAMPLES, HISTOGRAMS, REPORT),
    *(PROMPT_JSON, PROMPT_TABLE),
    *(f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")),
}


def may_be_replaced(config: AnalyzeConfig) -> bool:
    """Whether files of these names that are in the output folder are an analysis'; `UsageError` where they are of
    another autoencoder and the folder was not chosen with --out: a.pt and a folder a would share a.analysis."""
    record, out, local = config.out_dir / CONFIG, config.out_dir, config.sae.exists()
    before = None
    with contextlib.suppress(OSError, ValueError):
        before = tomllib.loads(record.read_text(encoding="utf-8")).get("sae")
    if config.out is None and isinstance(before, str):
        names = (Path(before).name, config.sae.name) if local else (before, str(config.sae))
        # The weights alone, which `train` leaves beside a checkpoint, are the same autoencoder.
        was, now = (name.removesuffix(".safetensors") + ".pt" * name.endswith(".safetensors") for name in names)
        if was != now and (not local or out.with_name(names[0]).exists()):
            raise UsageError(f"{out} holds the analysis of {before}: choose another folder for this one with --out")
    return config.out is None or record.exists()
