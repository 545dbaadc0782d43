"""Names of what lies beside a store or a checkpoint: acts.zarr has acts.harvest.toml, ckpt.pt has ckpt.loss.png.

How: only an ending that says what a thing is gets replaced: in `llama-0.5b` the dot is part of the name, so that it
does not share its files with llama-0.6b.
"""

from pathlib import Path

ENDINGS = (".zarr", ".pt", ".safetensors")


def stem(path: Path) -> str:
    """The name without the ending that says what it is."""
    return path.stem if path.suffix in ENDINGS else path.name


def beside(path: Path, ending: str) -> Path:
    """The file or folder with this ending that goes with `path`."""
    return path.with_name(stem(path) + ending)
