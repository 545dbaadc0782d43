"""Models with a store and an autoencoder, each made once."""

from typing import Any

import pytest

from tests.support.harvested import make_checkpoint, make_harvested
from tests.support.prompted import Make, Setting


@pytest.fixture(scope="package")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    root = tmp_path_factory.mktemp("prompt")
    made: dict[Any, Setting] = {}

    def make_one(architecture: str, *, with_lens: bool = False) -> Setting:
        key = (architecture, with_lens)
        if key not in made:
            harvested = make_harvested(root, architecture, with_lens=with_lens)
            path = root / f"{architecture}-{with_lens}.pt"
            made[key] = Setting(harvested, make_checkpoint(path, harvested.store), path)
        return made[key]

    return make_one
