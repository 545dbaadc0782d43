"""Nothing but a harvest writes into a store."""

from pathlib import Path

import pytest

from residscope.errors import UsageError
from store.folder import is_store, refuse_inside_store
from tests.support.stores import make_store, random_activations


def test_a_store_and_what_lies_in_it_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "acts.zarr", random_activations(40)).path
    (tmp_path / "link").symlink_to(store)
    assert is_store(store)
    assert not is_store(tmp_path)
    for out in (store, tmp_path / "link"):
        with pytest.raises(UsageError, match="is an activation store; choose a path outside it"):
            refuse_inside_store(out)
        refuse_inside_store(out, may_be_one=True)
    for out in (store / "a", store / "a" / "b.pt", tmp_path / "link" / "a", store / "resid_post", store / "x" / ".."):
        if out.resolve() != store:
            with pytest.raises(UsageError, match=r"--to .* is inside the activation store .*acts\.zarr"):
                refuse_inside_store(out, "--to", may_be_one=True)
    for out in (tmp_path, tmp_path / "acts.zarr.analysis", store / ".." / "ckpt.pt", tmp_path / "nowhere" / "x"):
        refuse_inside_store(out)
