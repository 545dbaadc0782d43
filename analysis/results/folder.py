"""The names of the files in the folder that an analysis writes. They get there together (`residscope.destinations`),
summary.json last: a folder without summary.json holds no whole analysis. Tested in test_added.py."""

from analysis.config import AnalyzeConfig
from residscope.destinations import refuse_shared

SUMMARY, CONFIG, REPORT = "summary.json", "analyze.config.toml", "report.html"
LATENTS, LAYERS, REDUNDANCY = "latents.parquet", "layers.parquet", "redundancy.parquet"
LATENT_LOGITS, HISTOGRAMS = "latent_logits.parquet", "histograms.parquet"
EXAMPLES, RANDOM_EXAMPLES = "examples.parquet", "random_examples.parquet"
PROMPT_JSON, PROMPT_TABLE = "prompt.json", "prompt.parquet"
"""What `analyze --prompt` adds to an analysis."""

EXPLANATIONS = "explanations.parquet"
"""What `analyze --delphi-scores` adds."""

FIGURES = ("layer_profile", "variance", "reconstruction", "downstream")
"""Of each a PNG and an SVG, which `analysis.report.page` may write beside report.html."""

FILES = {
    *(SUMMARY, LATENTS, LAYERS, CONFIG, REDUNDANCY, LATENT_LOGITS, EXAMPLES, RANDOM_EXAMPLES, HISTOGRAMS, REPORT),
    *(PROMPT_JSON, PROMPT_TABLE, EXPLANATIONS),
    *(f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")),
}


def may_be_replaced(config: AnalyzeConfig) -> bool:
    """Whether files of these names that are in the output folder are an analysis'; `UsageError` where they are of
    another autoencoder and the folder was not chosen with --out: a.pt and a folder a would share a.analysis."""
    record = config.out_dir / CONFIG
    if config.out is None:
        refuse_shared(config.sae, record, flag="--sae", way_out="choose another folder with --out")
    return config.out is None or record.exists()
