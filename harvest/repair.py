"""Fill again the shards that a store lacks, with the options that it was made with (`residscope verify --repair`).

How: `harvest` leaves its options beside the store; run with them once more, it continues the store from the token ids
that are in it. What it does not do: find or prove anything (store/repair.py does).
"""

from pathlib import Path

from harvest.config import HarvestConfig
from harvest.run import harvest
from store.errors import ResidscopeError
from store.options import parse_options


def refill(path: Path) -> None:
    """Fill the missing shards of the store at `path`.

    Raises what `harvest` raises, and `ResidscopeError` where the file with the store's options is gone.
    """
    options = path.with_suffix(".harvest.toml")
    if not options.is_file():
        raise ResidscopeError(
            f"{options}: the options that {path} was made with are not there. Run its `harvest` command again: it fills"
            " what is missing"
        )
    words = ["--config", str(options), "--out", str(path), "--no-overwrite", "--no-dry-run"]
    harvest(parse_options(HarvestConfig, words, prog="harvest", description="Fill what is missing."))
