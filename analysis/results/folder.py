"""The folder that an analysis writes: the names of its files, and how they get there whole.

Results are made in a folder of their own inside the output folder and moved into place when all are there, summary.json
last: a folder without summary.json holds no whole analysis.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from residscope.destinations import held_alone, require_folder
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


@contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """An empty folder inside `out` to make results in, held alone; made before the work, so that a folder that cannot
    be written stops the run at once."""
    require_folder(out)
    folder = out / ".partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"--out {out}: a part of this path is a file, not a folder: choose another") from None
    with held_alone(folder, out):
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield folder
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            # Of the several libraries that write here most do not say where.
            raise OSError(error.errno, os.strerror(error.errno), error.filename or str(out)) from error


def move_into_place(partial: Path, out: Path) -> None:
    """Replace what an earlier analysis left by what this one made, summary.json first away and last back."""
    (out / SUMMARY).unlink(missing_ok=True)
    for name in FILES:
        if not (partial / name).exists():
            (out / name).unlink(missing_ok=True)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == SUMMARY):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.replace(out / path.name)
    shutil.rmtree(partial)
