"""The names of the files that an analysis writes. They are moved into its folder together (`residscope.destinations`),
summary.json last: a folder without it holds no complete analysis. Tested in test_added.py."""

from analysis.config import AnalyzeConfig
from residscope.destinations import refuse_shared

SUMMARY, CONFIG, REPORT = "summary.json", "analyze.config.toml", "report.html"
LATENTS, LAYERS, REDUNDANCY = "latents.parquet", "layers.parquet", "redundancy.parquet"
LATENT_LOGITS, HISTOGRAMS = "latent_logits.parquet", "histograms.parquet"
EXAMPLES, RANDOM_EXAMPLES = "examples.parquet", "random_examples.parquet"
PROMPT_JSON, PROMPT_TABLE = "prompt.json", "prompt.parquet"
"""Added to an analysis by `analyze --prompt`."""

EXPLANATIONS = "explanations.parquet"
"""Added by `analyze --delphi-scores`."""

FIGURES = ("layer_profile", "variance", "reconstruction", "downstream")
"""Figures that `analysis.report.page` may write next to report.html, each as PNG and SVG."""

FILES = {
    *(SUMMARY, LATENTS, LAYERS, CONFIG, REDUNDANCY, LATENT_LOGITS, EXAMPLES, RANDOM_EXAMPLES, HISTOGRAMS, REPORT),
    *(PROMPT_JSON, PROMPT_TABLE, EXPLANATIONS),
    *(f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")),
}


def may_be_replaced(config: AnalyzeConfig) -> bool:
    """Whether files with these names in the output folder are an earlier analysis. Raises `UsageError` if they are
    another autoencoder's and the folder was not chosen with --out: a.pt and a folder a would share a.analysis."""
    record = config.out_dir / CONFIG
    if config.out is None:
        refuse_shared(config.sae, record, flag="--sae", way_out="choose another folder with --out")
    return config.out is None or record.exists()
