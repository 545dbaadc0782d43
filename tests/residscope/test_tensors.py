"""Files of torch.save: no byte is used that was not checked, and no size is believed before it was compared."""

import gc
import io
import pickle
import struct
import weakref
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from residscope import tensors
from residscope.errors import IncompatibleError
from residscope.tensors import Pieces, load_tensors, save_tensors

CONTENT = {
    "weights": torch.arange(12.0).reshape(3, 4).T,
    "half": torch.arange(4).bfloat16(),
    "none": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5),
    "words": ("a", 1, 2.5, None, True, [3], 2**40),
}


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def load(data: bytes) -> Any:
    return load_tensors(io.BytesIO(data), "a.pt")


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return list(a) == list(b) and all(map(equal, a.values(), b.values())) if isinstance(a, dict) else a == b


def rewritten(change: Any, compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive whose check sums are right, with other members: `change` takes and gives a dict of them."""
    with zipfile.ZipFile(io.BytesIO(saved(CONTENT))) as file:
        members = {name: file.read(name) for name in file.namelist()}
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", compression) as file:
        for name, data in change(members).items():
            file.writestr(name, data)
    return made.getvalue()


def test_what_was_saved_comes_back() -> None:
    assert equal(load(saved(CONTENT)), CONTENT)
    assert equal(load(rewritten(dict)), CONTENT)
    module = torch.nn.Linear(2, 3)
    assert equal(load(saved(module.state_dict())), dict(module.state_dict()))


def test_torch_reads_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "PIECE", 20)  # of a row and a part of another
    path = tmp_path / "a.pt"
    content = {**CONTENT, "bits": torch.tensor([True, False]), "of a larger one": torch.arange(100)[3:5]}
    with path.open("wb") as file:
        save_tensors(content, file)
    for found in (load(path.read_bytes()), *(torch.load(path, weights_only=True, mmap=mmap) for mmap in (False, True))):
        assert equal(found, content)
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        assert [info.file_size for info in archive.infolist()][3:] == [48, 8, 0, 4, 2, 16]
        for info in archive.infolist():
            file.seek(info.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            assert (file.tell() + name + extra) % 64 == 0  # where torch.save puts it


def test_what_is_let_go_leaves_the_memory_at_once() -> None:
    """Without a collection of cycles: a checkpoint's optimiser is as large as twice the weights."""
    gc.disable()
    try:
        found = load(saved(CONTENT))
        storage = weakref.ref(found["weights"]._base)
        assert storage() is not None
        del found["weights"]
        assert storage() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("data", [saved(CONTENT), rewritten(dict)], ids=["aligned", "not aligned"])
def test_a_mapped_file_is_checked_too_and_never_changed(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.pt"

    def mapped() -> Any:
        with path.open("rb") as file:
            return load_tensors(file, "a.pt", mapped=True)

    path.write_bytes(data)
    found = mapped()
    assert equal(found, CONTENT)
    found["weights"].add_(1)
    assert path.read_bytes() == data
    at = data.index(CONTENT["weights"].T.numpy().tobytes())
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(IncompatibleError, match="Bad CRC"):
        mapped()


def test_a_tensor_is_written_as_it_comes() -> None:
    order: list[str] = []

    def parts(name: str) -> Iterator[Tensor]:
        for i in range(3):
            order.append(f"{name}{i}")
            yield torch.full((2, 2), float(i))

    content = {name: Pieces((6, 2), torch.float32, partial(parts, name)) for name in "ab"}
    file = io.BytesIO()
    save_tensors(content, file)
    found = load(file.getvalue())
    assert found["a"].tolist() == found["b"].tolist() == [[i, i] for i in (0, 0, 1, 1, 2, 2)]
    assert order == ["a0", "a1", "a2", "b0", "b1", "b2"]
    save_tensors(content, None)
    assert order[6:] == order[:6]


def test_equal_content_is_equal_bytes_whether_or_not_it_is_the_same_object() -> None:
    one, other, shared = io.BytesIO(), io.BytesIO(), [1.5, "a word"]
    save_tensors({"a word": shared, "b": shared}, one)
    save_tensors({"".join(["a ", "word"]): list(shared), "b": [1.5, "".join(["a w", "ord"])]}, other)
    assert one.getvalue() == other.getvalue()


def test_a_flipped_bit_is_refused_or_changes_nothing() -> None:
    data = saved(CONTENT)
    directory = data.index(b"PK\x01\x02")
    rng = np.random.default_rng(0)
    bits = [*rng.integers(8 * directory, size=250), *rng.integers(8 * directory, 8 * len(data), size=350)]
    refused = 0
    for bit in map(int, bits):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            assert equal(load(bytes(changed)), CONTENT), bit
        except IncompatibleError:
            refused += 1
    assert 150 < refused < 600


def test_a_member_that_claims_to_be_a_folder_is_read_all_the_same() -> None:
    """torch.load gives uninitialised memory for it."""
    data = bytearray(saved(CONTENT))
    at = data.index(b"PK\x01\x02")
    while data[at : at + 4] == b"PK\x01\x02":
        data[at + 38] |= 0x10  # external attributes
        at += 46 + sum(struct.unpack_from("<3H", data, at + 28))
    assert equal(load(bytes(data)), CONTENT)


def pickled(*operations: bytes) -> bytes:
    content = b"\x80\x02" + b"".join(operations) + b"."
    return rewritten(lambda members: {**members, "archive/data.pkl": content})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (saved({"a": torch.zeros(1).expand(50_000, 50_000)}), r"\[50000, 50000\] is more than the 1 numbers"),
        (rewritten(dict, zipfile.ZIP_DEFLATED), "is compressed"),
        (rewritten(lambda members: {k: v * 2 if "data/0" in k else v for k, v in members.items()}), "found 96 bytes"),
        (rewritten(lambda members: {k: v for k, v in members.items() if "data/0" not in k}), "no item named"),
        (rewritten(lambda members: {**members, "archive/byteorder": b"big"}), "little-endian"),
        (pickled(b"}r\xff\xff\xff\x7f"), "claims more memory"),
        (pickled(b"}p2000000000\n"), "claims more memory"),
        (pickled(b"cbuiltins\nbytearray\nM\xff\xff\x85R"), r"refused: .*\(builtins\.bytearray\)"),
        (pickled(b"ctorch\nTensor\nM\xff\xff\x85R"), r"refused: .*\(torch\.Tensor\)"),
        (pickled(b"(" * 100_000), "cannot be read as plain tensors"),
        (saved(CONTENT)[:-30], "cannot be read as plain tensors"),
        (pickle.dumps({"a": 1}), "bare pickle files are never loaded"),
        (b"", "cannot be read as plain tensors"),
    ],
)
def test_what_claims_more_than_there_is_or_could_be_code_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(IncompatibleError, match=rf"a\.pt: .*{said}") as caught:
        load(data)
    assert "\n" not in str(caught.value)


def test_a_tensor_is_not_given_other_memory() -> None:
    """BUILD calls a tensor's __setstate__, which would make its storage as large as it is told to."""
    plain = saved(torch.zeros(2))
    with zipfile.ZipFile(io.BytesIO(plain)) as file:
        members = {name: file.read(name) for name in file.namelist()}
    made = members["archive/data.pkl"].rpartition(b"R")[0] + b"Rq\xf0"
    built = made + b"(h\xf0K\x00M\xff\xff\x85K\x01\x85tb."  # its state: itself, 0, (65535,), (1,)
    with pytest.raises(IncompatibleError, match="not resizable"):
        load(rewritten(lambda _: {**members, "archive/data.pkl": built}))
