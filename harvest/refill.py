"""Refills the missing shards of a store with the options that it was made with (`residscope verify --repair`).

How: `harvest` leaves its options next to the store; run with them again, it continues the store from the token ids in
it. Not here: finding the bad shards and verifying the new ones (`store.care.repair`).
"""

from collections.abc import Callable
from pathlib import Path

from harvest.config import HarvestConfig
from harvest.options_file import options_file
from harvest.record import refuse_differences
from harvest.run import harvest, look_up
from harvest.settings import load_weights
from residscope.errors import ResidscopeError
from residscope.options import parse_options
from store.activations import ActivationStore


def prepare(path: Path) -> Callable[[], object]:
    """Load the model of the store at `path`, changing nothing; returns a function that fills the missing shards.

    Raises what `harvest` raises, and `ResidscopeError` if the file with the store's options is gone.
    """
    options = options_file(path)
    if not options.is_file():
        way_out = "Nothing was changed. Run the store's `harvest` command again (it writes that file), then repair"
        raise ResidscopeError(f"{options}, which records how {path} was made, is missing. {way_out}")
    words = ["--config", str(options), "--out", str(path), "--no-overwrite", "--no-dry-run"]
    config = parse_options(HarvestConfig, words, prog="harvest", description="Fill what is missing.")
    job = look_up(config, begun=True)
    provenance = ActivationStore.open(path, partial=True).meta.provenance
    refuse_differences(path, provenance.get("config"), job.record)
    model = load_weights(job.settings)
    return lambda: harvest(config, model)
