"""Damaged copies of files: flipped bits, lost ends, other values where a format holds values.

`mutated` keeps a format's own structure in most of its draws (JSON, TOML, safetensors, Parquet, what torch.save
writes), so that what it breaks is met by a reader's later lines, not by its first.
"""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

DEEP, LONG = "deep", "long"
"""Stand for JSON that no reader takes: 100,000 brackets, and a number of 5,000 digits."""

_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 2**31, 10**15, 10**30, 1.5, -0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "none", "é\ud800", "../..", [], [0], [[]], ["x"], {}, {"a": 1}, DEEP, LONG),
)


def mutated(path: Path, rng: random.Random) -> bytes:
    """The bytes of a file after a fault."""
    data = path.read_bytes()
    structured = next((change for ending, change in _STRUCTURED.items() if path.name.endswith(ending)), None)
    if structured is not None and rng.random() < 0.6:
        try:
            return structured(data, rng)
        except (OverflowError, RuntimeError, pa.ArrowException):  # a value that the format cannot hold
            pass
    return _bytes(data, rng)


def _bytes(data: bytes, rng: random.Random) -> bytes:
    at, other = rng.randrange(len(data)), rng.randrange(len(data))
    length = rng.choice((1, 4, 16, 256))
    changed = bytearray(data)
    kind = rng.randrange(7)
    if kind == 0:
        changed[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        changed[at : at + length] = rng.randbytes(length)
    elif kind == 2:
        del changed[at:]
    elif kind == 3:
        del changed[at : at + length]
    elif kind == 4:
        changed[at:at] = data[other : other + length]
    elif kind == 5:
        changed[at : at + length] = bytes(min(length, len(data) - at))
    else:
        changed += rng.randbytes(length)
    return bytes(changed)


def change(value: Any, rng: random.Random) -> Any:
    """A plain value (mappings, lists, tensors, words, numbers) with one part of it gone, renamed or another."""
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = rng.choice(list(value))
        kind = rng.randrange(8)
        if kind == 0:
            return {name: item for name, item in value.items() if name != key}
        if kind == 1:
            return {(f"{name}_" if name == key else name): item for name, item in value.items()}
        return {**value, key: change(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        if rng.randrange(4) == 0:
            return value[:i] + value[i + 1 :]
        return [*value[:i], change(value[i], rng), *value[i + 1 :]]
    if isinstance(value, torch.Tensor):
        choices: tuple[Callable[[], Any], ...] = (
            lambda: value.reshape(-1),
            lambda: value.double(),
            lambda: value.to(torch.int8),
            lambda: value * float("nan"),
            lambda: value[:0],
            lambda: value.unsqueeze(0),
            lambda: value.to_sparse(),
            lambda: None,
        )
        return rng.choice(choices)()
    if isinstance(value, int) and rng.randrange(3) == 0:
        return rng.choice((value + 1, value - 1, -value, float(value), str(value), 10 * value))
    return rng.choice(_VALUES)


def _json(data: bytes, rng: random.Random) -> bytes:
    text = json.dumps(change(json.loads(data), rng))
    return _spelled(text).encode("utf-8", "surrogatepass")


def _spelled(text: str) -> str:
    return text.replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000).replace(f'"{LONG}"', "9" * 5000)


def _json_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    i = rng.randrange(len(lines))
    lines[i] = _json(lines[i], rng) + b"\n"
    if rng.randrange(4) == 0:
        rng.shuffle(lines)
    return b"".join(lines)


def _toml(data: bytes, rng: random.Random) -> bytes:
    lines = data.decode().splitlines()
    i = rng.randrange(len(lines))
    name = lines[i].partition("=")[0]
    word = json.dumps(rng.choice(_VALUES), ensure_ascii=False).replace("null", "nan").replace("NaN", "nan")
    lines[i] = rng.choice((f"{name}= {_spelled(word)}", lines[i] + "\n" + lines[i], f"x{lines[i]}", "[" + lines[i]))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _safetensors(data: bytes, rng: random.Random) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    inner = header.get("__metadata__", {})
    if "config" in inner and rng.randrange(2):
        name = rng.choice(("config", "store", "trainer"))
        inner[name] = _spelled(json.dumps(change(json.loads(inner[name]), rng)))
        text = json.dumps(header)
    else:
        text = _spelled(json.dumps(change(header, rng)))
    packed = text.encode("utf-8", "surrogatepass")
    return len(packed).to_bytes(8, "little") + packed + data[8 + size :]


def _torch(data: bytes, rng: random.Random) -> bytes:
    content = change(torch.load(io.BytesIO(data), weights_only=True), rng)
    saved = io.BytesIO()
    torch.save(content, saved)
    return saved.getvalue()


def _parquet(data: bytes, rng: random.Random) -> bytes:
    table = pq.read_table(io.BytesIO(data))
    name = rng.choice(table.column_names)
    i, n = table.column_names.index(name), table.num_rows
    others: tuple[Callable[[], pa.Table], ...] = (
        lambda: table.drop_columns([name]),
        lambda: table.slice(0, 0),
        lambda: table.slice(0, n // 2),
        lambda: table.rename_columns([f"{column}_" if column == name else column for column in table.column_names]),
        lambda: table.set_column(i, name, pa.array([rng.choice(_VALUES[:6])] * n)),
        lambda: table.set_column(i, name, pa.array(["x"] * n)),
        lambda: table.set_column(i, name, pa.array([[1.0] * (row % 3) for row in range(n)])),
        lambda: table.set_column(i, name, pa.array([-(10**9)] * n)),
        lambda: table.set_column(i, name, pa.array([float("nan")] * n)),
        lambda: pa.concat_tables([table, table]),
        lambda: table.replace_schema_metadata({"edges": "[["}),
    )
    sink = io.BytesIO()
    pq.write_table(rng.choice(others)(), sink)
    return sink.getvalue()


_STRUCTURED = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".toml": _toml,
    ".safetensors": _safetensors,
    ".pt": _torch,
    ".parquet": _parquet,
}
