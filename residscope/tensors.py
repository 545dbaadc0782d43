"""Tensors and plain values in files of `torch.save`'s format: written piece by piece, read with every byte checked.

`torch.save` needs each tensor whole in memory. `torch.load` verifies no checksums, trusts a damaged directory (a
member that claims to be a folder becomes uninitialised memory) and lets a tensor claim more numbers than its storage
has. Here each member is read from one open file, its checksum and sizes are verified, and then it becomes the tensor.
Only tensors, mappings and plain values can be created, so that a file from a stranger cannot run code.
"""

import io
import math
import mmap
import os
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from residscope.errors import IncompatibleError
from residscope.reading import reading

_DTYPES = (torch.double, torch.float, torch.half, torch.bfloat16, torch.long, torch.int, torch.uint8, torch.bool)
_STORAGES = [f"{word}Storage" for word in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Byte", "Bool")]

PIECE = 2**24
"""Bytes that are read, written or sent at once."""

_ALIGNED = 64  # bytes, as torch.save's


class Pieces(NamedTuple):
    """A tensor that is written piece by piece, and so need not be whole in this process's memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Callable[[], Iterable[Tensor]]
    """Gives its numbers in order; called once."""


def save_tensors(content: Any, file: BinaryIO | None) -> None:
    """Write tensors of any device, `Pieces`, dicts, lists, tuples and plain values; equal content gives equal bytes.

    Without a file, all pieces are still requested in the same order, for processes that only send their share."""
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(content)
    if file is None:
        for storage in pickler.storages:
            for _ in storage.parts():
                pass
        return
    members: list[tuple[str, Iterable[bytes | memoryview]]] = [("data.pkl", [pickled.getvalue()])]
    members += [("byteorder", [b"little"]), ("version", [b"3\n"])]
    members += [(f"data/{i}", _as_bytes(storage)) for i, storage in enumerate(pickler.storages)]
    with zipfile.ZipFile(file, "w") as archive:
        for name, parts in members:
            info = zipfile.ZipInfo(f"archive/{name}")  # with a fixed date
            before = file.tell() + 30 + len(info.filename) + 20  # the header, the name, and the sizes in 64 bits
            n = -(before + 4) % _ALIGNED
            info.extra = struct.pack("<2sH", b"FB", n) + bytes(n)
            with archive.open(info, mode="w", force_zip64=True) as member:
                for part in parts:
                    member.write(part)


def in_pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Parts of `tensor` [M, ...], in order, on the CPU, of about `PIECE` bytes; none if it is empty."""
    if tensor.numel():
        rows = tensor.reshape(-1) if tensor.ndim == 0 else tensor
        for part in rows.split(max(1, PIECE * len(rows) // rows.nbytes)):
            yield (part if part.is_meta else part.cpu()).contiguous()


def _as_bytes(storage: Pieces) -> Iterator[memoryview]:
    for part in storage.parts():
        yield part.view(-1).view(torch.uint8).numpy().data


class _Pickler(pickle.Pickler):
    """Leaves the tensors' numbers to separate members of the archive, in the order in which tensors appear."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, protocol=2)
        self.fast = True  # No memo: the bytes depend on the content alone, not on which values are the same object.
        self.storages: list[Pieces] = []

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            found = Pieces(tuple(value.shape), value.dtype, lambda: in_pieces(value.detach()))
        elif isinstance(value, Pieces):
            found = value
        else:
            return NotImplemented
        stride = torch.empty(found.shape, device="meta").stride()
        return _rebuild_tensor_v2, (_Storage(found), 0, found.shape, stride, False, OrderedDict())

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        self.storages.append(value.of)
        kind = getattr(torch, _STORAGES[_DTYPES.index(value.of.dtype)])
        return "storage", kind, str(len(self.storages) - 1), "cpu", math.prod(value.of.shape)


class _Storage:
    """A placeholder for the numbers of a tensor."""

    def __init__(self, of: Pieces) -> None:
        self.of = of


def load_tensors(file: BinaryIO, where: str, *, mapped: bool = False) -> Any:
    """The file's content: tensors on the CPU, dicts, lists, tuples, strings, numbers.

    where: its name. mapped: tensors are views of the file, read into memory only as they are used; the file must not be
    changed in place. `IncompatibleError` if it is damaged, not an archive of `torch.save`, or holds anything else.
    """
    may_be = "it was cut short, damaged, or is not an archive of torch.save (bare pickle files are never loaded)"
    with reading(f"{where}: cannot be read as plain tensors", may_be), zipfile.ZipFile(file) as archive:
        unpickler = _Unpickler(archive, where, file.fileno() if mapped else None)
        found = unpickler.load()
        unpickler.memo.clear()  # Breaks a reference cycle that would keep all tensors until the next full collection.
        return found


class _Mapping(dict[Any, Any]):
    """Replaces an OrderedDict, such as a module's state, without its attributes."""

    def __setstate__(self, state: object) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Creates only plain values, `_Mapping` and tensors from the archive's members."""

    def __init__(self, archive: zipfile.ZipFile, where: str, descriptor: int | None) -> None:
        self._where, self._descriptor = where, descriptor
        self._archive, names = archive, archive.namelist()
        if len(set(names)) < len(names):
            raise ValueError("it has two members with the same name")
        self._storages: dict[str, Tensor] = {}
        self._root = next((name for name in names if name.endswith("/data.pkl")), "data.pkl")[: -len("data.pkl")]
        content = self._member("data.pkl")
        if f"{self._root}byteorder" in names and self._member("byteorder") != b"little":
            raise ValueError("its numbers are not little-endian")
        for operation, value, _ in pickletools.genops(content):
            if operation.name in ("PUT", "LONG_BINPUT") and int(value or 0) > len(content):
                raise ValueError("its pickle claims more memory than it can need")
        super().__init__(io.BytesIO(content))

    def _member(self, name: str) -> bytearray:
        """A member's bytes, with its checksum verified."""
        info = self._archive.getinfo(self._root + name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")
        data = bytearray()
        with self._archive.open(info) as member:
            while part := member.read(PIECE):  # The checksum is verified at the end.
                data += part
        return data

    def _view(self, name: str, descriptor: int) -> memoryview | bytearray:
        """A member as a part of the file, with its own mapping; a member that is not aligned is read."""
        info = self._archive.getinfo(self._root + name)
        start = info.header_offset + 30 + sum(struct.unpack("<HH", os.pread(descriptor, 4, info.header_offset + 26)))
        if start % _ALIGNED or info.compress_type != zipfile.ZIP_STORED or not info.file_size:
            return self._member(name)
        with self._archive.open(info) as member:
            while member.read(PIECE):
                pass
        page = start - start % mmap.ALLOCATIONGRANULARITY
        view = mmap.mmap(descriptor, start - page + info.file_size, access=mmap.ACCESS_COPY, offset=page)
        return memoryview(view)[start - page :]

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _DTYPES[_STORAGES.index(name)]
        known = {"torch._utils._rebuild_tensor_v2": self._tensor, "collections.OrderedDict": _Mapping}
        if f"{module}.{name}" not in known:
            what = f"more than tensors and plain values ({module}.{name}), so loading it could run code"
            raise IncompatibleError(f"{self._where}: refused: it contains {what}")
        return known[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage as a flat tensor; its memory is a buffer, which cannot be resized."""
        _, dtype, key, _, n = pid
        if key not in self._storages:
            name = f"data/{key}"
            data = self._member(name) if self._descriptor is None else self._view(name, self._descriptor)
            if type(n) is not int or n * dtype.itemsize != len(data):
                raise ValueError(f"data/{key} should have {n} numbers of {dtype}, found {len(data)} bytes")
            self._storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._storages[key]

    def _tensor(self, flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
        if math.prod(size) > len(flat):
            raise ValueError(f"a tensor of shape {list(size)} is more than the {len(flat)} numbers of its storage")
        return torch.as_strided(flat, size, stride, offset)
