"""Names of the files next to a store or a checkpoint (acts.zarr has acts.harvest.toml, ckpt.pt has ckpt.loss.png), and
the versions that records list.

How: only known endings are replaced: in `llama-0.5b` the dot is part of the name, so that it does not share its files
with llama-0.6b.
"""

from pathlib import Path

ENDINGS = (".zarr", ".pt", ".safetensors")


def stem(path: Path) -> str:
    """The name without a known ending."""
    return path.stem if path.suffix in ENDINGS else path.name


def beside(path: Path, ending: str) -> Path:
    """The file or folder with this ending that goes with `path`."""
    return path.with_name(stem(path) + ending)


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python and of some packages; "not installed" for a missing one."""
    import importlib.metadata  # This import takes as long as all of --help.
    import platform

    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
