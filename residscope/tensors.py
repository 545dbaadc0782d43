"""Tensors and plain values out of a file that `torch.save` wrote, of which no byte is used that was not checked.

`torch.load` compares no check sum, believes a damaged directory (a member that claims to be a folder becomes
uninitialised memory) and lets a tensor claim more numbers than its storage has. Here each member is read once, from one
open file; its check sum and sizes are compared; then these same bytes become the tensor. Only tensors, mappings and
plain values can be made, so that a file from a stranger cannot run code. Memory: the tensors, and the largest again.
"""

import errno
import io
import math
import pickle
import pickletools
import warnings
import zipfile
from typing import Any, BinaryIO

import torch
from torch import Tensor

from residscope.errors import IncompatibleError

_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def load_tensors(file: BinaryIO, where: str) -> Any:
    """What the file holds: tensors on the CPU, dicts, lists, tuples, strings, numbers.

    where: what the user calls the file. Raises `IncompatibleError` if it is damaged, is no archive of `torch.save`, or
    holds anything else.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return _Unpickler(archive).load()
    except pickle.UnpicklingError as error:
        raise IncompatibleError(
            f"{where}: refused: it contains more than tensors and plain values ({_words(error)}), so loading it could "
            "run code"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged archive or pickle raises nearly anything
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # of the disk; EINVAL is what a damaged index gives, which seeks beyond the file's ends
        raise IncompatibleError(
            f"{where}: cannot be read as plain tensors ({_words(error)}): it was cut short, damaged, or is no archive as "
            "torch.save writes them (bare pickle files are never loaded)"
        ) from None


def _words(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:120]


class _Mapping(dict[Any, Any]):
    """For an OrderedDict, which a module's state is: without its attributes."""

    def __setstate__(self, state: object) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Makes nothing but plain values, `_Mapping` and tensors out of the archive's members."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._storages: dict[str, Tensor] = {}
        self._made: list[tuple[Tensor, int]] = []
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise ValueError("it has several members of one name")
        self._root = next((name for name in names if name.endswith("/data.pkl")), "data.pkl").removesuffix("data.pkl")
        content = bytes(self._member("data.pkl"))
        if f"{self._root}byteorder" in names and self._member("byteorder") != b"little":
            raise ValueError("its numbers are not little-endian")
        for operation, value, _ in pickletools.genops(content):
            if operation.name in ("PUT", "LONG_BINPUT") and value > len(content):
                raise ValueError("its pickle claims more memory than it can need")
        super().__init__(io.BytesIO(content))

    def load(self) -> Any:
        found = super().load()
        if any(tensor.untyped_storage().nbytes() != n_bytes for tensor, n_bytes in self._made):
            raise ValueError("a tensor was given other memory")
        return found

    def _member(self, name: str) -> bytearray:
        """A member's bytes, whose check sum is right."""
        info = self._archive.getinfo(self._root + name)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > info.compress_size:
            raise ValueError(f"{name} is compressed, or has other sizes than it claims")
        with self._archive.open(info) as member:
            return bytearray(member.read())

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _TYPES:
            return _TYPES[name]
        known = {"torch._utils._rebuild_tensor_v2": self._tensor, "collections.OrderedDict": _Mapping}
        known["torch._utils._rebuild_parameter"] = lambda tensor, *_: tensor
        if f"{module}.{name}" not in known:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return known[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage, as a flat tensor."""
        _, dtype, key, _, n = pid
        if key not in self._storages:
            data = self._member(f"data/{key}")
            if type(n) is not int or n * dtype.itemsize != len(data):
                raise ValueError(f"data/{key} should have {n} numbers of {dtype.itemsize} bytes, it has {len(data)} bytes")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._storages[key]

    def _tensor(self, flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
        if math.prod(size) > len(flat):
            raise ValueError(f"a tensor of shape {list(size)} is more than the {len(flat)} numbers of its storage")
        tensor = torch.as_strided(flat, size, stride, offset)
        self._made.append((tensor, flat.untyped_storage().nbytes()))
        return tensor
