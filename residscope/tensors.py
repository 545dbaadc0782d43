"""Tensors and plain values out of a file that `torch.save` wrote, of which no byte is used that was not checked.

`torch.load` compares no check sum, believes a damaged directory (a member that claims to be a folder becomes
uninitialised memory) and lets a tensor claim more numbers than its storage has. Here each member is read once, from one
open file; its check sum and sizes are compared; then these same bytes become the tensor. Only tensors, mappings and
plain values can be made, so that a file from a stranger cannot run code. Memory: the tensors, and twice the largest.
"""

import errno
import io
import math
import pickle
import pickletools
import zipfile
from typing import Any, BinaryIO

import torch
from torch import Tensor

from residscope.errors import IncompatibleError, first_line

_DTYPES = (torch.double, torch.float, torch.half, torch.bfloat16, torch.long, torch.int, torch.uint8, torch.bool)
_STORAGES = [f"{word}Storage" for word in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Byte", "Bool")]


def load_tensors(file: BinaryIO, where: str) -> Any:
    """What the file holds: tensors on the CPU, dicts, lists, tuples, strings, numbers.

    where: what the user calls the file. Raises `IncompatibleError` if it is damaged, no such archive, or holds more.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return _Unpickler(archive, where).load()
    except (MemoryError, IncompatibleError):
        raise
    except Exception as error:  # a damaged archive or pickle raises nearly anything
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # of the disk; EINVAL is what a damaged index gives, which seeks beyond the file's ends
        reason = first_line(error)[:120]
        raise IncompatibleError(
            f"{where}: cannot be read as plain tensors ({reason}): it was cut short, damaged, or is no archive as "
            "torch.save writes them (bare pickle files are never loaded)"
        ) from None


class _Mapping(dict[Any, Any]):
    """For an OrderedDict, as a module's state is one: without its attributes."""

    def __setstate__(self, state: object) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Makes nothing but plain values, `_Mapping` and tensors out of the archive's members."""

    def __init__(self, archive: zipfile.ZipFile, where: str) -> None:
        self._where = where
        self._archive, names = archive, archive.namelist()
        if len(set(names)) < len(names):
            raise ValueError("it has two members of one name")
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
        """A member's bytes, whose check sum is right."""
        info = self._archive.getinfo(self._root + name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")
        return bytearray(self._archive.read(info))

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _DTYPES[_STORAGES.index(name)]
        known = {"torch._utils._rebuild_tensor_v2": self._tensor, "collections.OrderedDict": _Mapping}
        if f"{module}.{name}" not in known:
            what = f"more than tensors and plain values ({module}.{name}), so loading it could run code"
            raise IncompatibleError(f"{self._where}: refused: it contains {what}")
        return known[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage, as a flat tensor; its memory is a buffer, so that it cannot be resized."""
        _, dtype, key, _, n = pid
        if key not in self._storages:
            data = self._member(f"data/{key}")
            if type(n) is not int or n * dtype.itemsize != len(data):
                raise ValueError(f"data/{key} should have {n} numbers of {dtype}, it has {len(data)} bytes")
            self._storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._storages[key]

    def _tensor(self, flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
        if math.prod(size) > len(flat):
            raise ValueError(f"a tensor of shape {list(size)} is more than the {len(flat)} numbers of its storage")
        return torch.as_strided(flat, size, stride, offset)
