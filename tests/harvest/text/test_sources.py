"""Text sources: what each reads, in which order, and what each says where it cannot."""

import dataclasses
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from harvest.model.hub import HubRepo
from harvest.text import local
from harvest.text import sources as texts
from harvest.text.config import TextConfig
from harvest.text.sources import TextSource, open_sources
from residscope.errors import IncompatibleError, ResidscopeError, UsageError
from store.shuffle import permutation

ROWS = ["first document", "second\nwith a line", "third é"]


def config(dataset: object, **changes: Any) -> TextConfig:
    return TextConfig(dataset=(str(dataset),), **changes)


def open_source(options: TextConfig, *how: Any, **named: Any) -> TextSource:
    (source,) = open_sources(options, *how, **named)
    return source


def read(dataset: object, shuffle_seed: int | None = None, **changes: Any) -> list[Any]:
    return list(open_source(config(dataset, **changes), shuffle_seed).documents())


def write(path: Path, column: str = "text") -> Path:
    lines = "".join(json.dumps({column: row, "n": i}) + "\n\n" for i, row in enumerate(ROWS)).encode()
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table({column: ROWS, "n": list(range(len(ROWS)))}), path)
    elif path.suffix == ".gz":
        half = lines.index(b"\n") + 1
        path.write_bytes(b"".join(gzip.compress(part) for part in (lines[:half], lines[half:])))
    elif path.suffix == ".zst":
        # Two frames one after another, as parallel compressors write.
        half = lines.index(b"\n") + 1
        path.write_bytes(b"".join(zstandard.compress(part) for part in (lines[:half], lines[half:])))
    else:
        path.write_bytes(lines)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_files_of_rows(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"data{suffix}", "body")
    assert read(path, text_column="body") == ROWS
    with pytest.raises(UsageError, match=r"no column 'text'; its columns are body, n"):
        read(path)
    with pytest.raises(UsageError, match="holds int"):
        read(path, text_column="n")


def test_a_text_file_is_one_document_and_a_folder_is_sorted(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("B\n\nB")
    (tmp_path / "sub" / "a.txt").write_text("A")
    (tmp_path / "notes.md").write_text("no")
    write(tmp_path / "c.jsonl")
    assert read(tmp_path / "b.txt") == ["B\n\nB"]
    assert read(tmp_path) == ["B\n\nB", *ROWS, "A"]
    assert read(tmp_path / "*.txt") == ["B\n\nB"]
    assert read(tmp_path / "**" / "*.txt") == ["B\n\nB", "A"]


def test_the_hash_of_local_files_follows_their_contents(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = open_source(config(path))
    assert first.dataset == "a.txt"
    assert first.revision == open_source(config(path)).revision
    path.write_text("two")
    assert first.revision != open_source(config(path)).revision


def test_a_txt_file_is_taken_as_it_is_but_for_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read(tmp_path / "a.txt") == ["one\r\ntwo\rthree\n"]


def test_a_zst_file_of_several_frames_is_read_whole_and_one_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    frames = [zstandard.ZstdCompressor().compress(b'{"text": "%d"}\n' % i * 20_000) for i in range(3)]
    whole = b"".join(frames)
    path.write_bytes(whole)
    assert read(path) == [str(i) for i in range(3) for _ in range(20_000)]
    for length in (len(whole) - 1, len(frames[0]) + 5, 10):
        path.write_bytes(whole[:length])
        with pytest.raises(ResidscopeError, match=r"a\.jsonl\.zst: cut short: it ends within its zstd data"):
            read(path)


def test_a_gz_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(b'{"text": "x"}\n' * 20_000)
    for length in (len(whole) - 1, len(whole) // 2, 11):
        path.write_bytes(whole[:length])
        with pytest.raises(ResidscopeError, match=r"a\.jsonl\.gz: cut short: it ends within its gzip data"):
            read(path)
    path.write_bytes(whole[:-6] + b"\0\0\0\0\0\0")  # check sum and length
    with pytest.raises(ResidscopeError, match="not valid gzip data"):
        read(path)


def test_null_text_is_an_empty_document(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": null}\n{"text": "x"}\n')
    assert read(path) == ["", "x"]


def test_half_a_surrogate_pair_is_no_character_and_becomes_the_replacement_character(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n')
    assert read(path) == ["a\ufffdb", "\U0001f600"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', r"a\.jsonl line 2: not valid JSON"),
        ("a.jsonl", b"[1]\n", r"line 1: should be an object with a 'text' field, found list"),
        ("a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n", r"a\.jsonl line 1: not readable JSON"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", r"a\.jsonl line 1: not (readable|valid) JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl line 2: not UTF-8 text \(byte 10 of the line\)"),
        ("a.jsonl.gz", b"not gzip at all", "not valid gzip"),
        ("a.jsonl.zst", b"not zstd at all", "not valid zstd"),
        ("a.parquet", b"PAR1 no", "not a valid parquet"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.txt", "some text".encode("utf-16-le"), r"a\.txt: NUL characters: UTF-16 without a byte order mark"),
        ("a.txt", "это русский текст".encode("utf-16-le"), r"a\.txt: NUL characters"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ResidscopeError, match=message):
        read(tmp_path / name)


def test_a_parquet_file_with_a_damaged_page_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["hello"] * 3}), path)
    data = bytearray(path.read_bytes())
    data[4:40] = b"\xff" * 36  # pyarrow raises an OSError for it
    path.write_bytes(data)
    with pytest.raises(ResidscopeError, match=r"a\.parquet: not a valid parquet file"):
        read(path)


@pytest.mark.parametrize("name", ["missing.txt", "./missing", "/no/where", "missing.jsonl", "*.nothing"])
def test_local_names_that_are_not_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="--dataset"):
        open_source(config(name))


def test_a_file_of_another_kind_and_options_of_the_hub_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(IncompatibleError, match=r"supported: \.txt"):
        open_source(config(tmp_path / "a.csv"))
    for change in ({"split": "test"}, {"dataset_config": "x"}, {"dataset_revision": "main"}):
        for dataset in (tmp_path / "a.txt", "pydoc"):
            with pytest.raises(UsageError, match="have no splits"):
                open_source(config(dataset, **change))


def test_pydoc_is_the_same_each_time_and_has_both_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pydoc_data import topics

    library = tmp_path / "lib"
    for name, source in {
        "b.py": '"""Module b."""\ndef f():\n    """Function f."""\nclass C:\n    "Class C."\n',
        "a.py": "x = 1\n",
        "bad.py": "def (\n",
        "test/t.py": '"""Not this."""\n',
        "z/__init__.py": '"""Package z."""\n',
    }.items():
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(source)
    monkeypatch.setattr(texts.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    documents = read("pydoc")
    n = len(topics.topics)
    assert documents[:n] == [topics.topics[name] for name in sorted(topics.topics)]
    assert documents[n:] == ["Module b.\n\nFunction f.\n\nClass C.", "Package z."]
    assert open_source(config("pydoc")).characters() == sum(map(len, documents))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub whose answer to `load_dataset` a test puts in; keeps what was asked."""
    import datasets

    state: dict[str, Any] = {"answer": lambda: iter(())}

    def load(*args: Any, **options: Any) -> Any:
        state["asked"] = args, options
        return state["answer"]()

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(texts, "pin", lambda repo, kind, revision, probes: HubRepo("c0ffee", False))
    return state


def test_a_hub_data_set_is_streamed_at_one_commit(hub: dict[str, Any]) -> None:
    hub["answer"] = lambda: iter([{"text": "a"}, {"text": "b"}])
    source = open_source(config("owner/name", split="test", dataset_config="small"))
    assert list(source.documents()) == ["a", "b"]
    assert source.revision == "c0ffee"
    expected = {"split": "test", "revision": "c0ffee", "streaming": True}
    assert hub["asked"] == (("owner/name", "small"), expected)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ValueError("Bad split: x. Available splits: ['train']"),
            r"no split 'train': Bad split.*Choose one with --split",
        ),
        (ValueError("Config name is missing.\nPlease pick one: ['a']"), r"--dataset-config \(Config name is missing"),
        (ConnectionError("gone"), r"cannot be read \(ConnectionError: gone\)"),
    ],
)
def test_errors_of_the_hub_are_one_line(hub: dict[str, Any], error: Exception, message: str) -> None:
    def fail() -> Any:
        raise error

    hub["answer"] = fail
    with pytest.raises(ResidscopeError, match=message) as raised:
        read("owner/name")
    assert "\n" not in str(raised.value)


def test_a_missing_column_of_a_hub_data_set_names_the_others(hub: dict[str, Any]) -> None:
    hub["answer"] = lambda: iter([{"content": "a", "id": 1}])
    with pytest.raises(UsageError, match="its columns are content, id"):
        read("owner/name")


def test_continuing_asks_no_hub(hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(texts, "pin", never)
    source = open_source(config("owner/name"), contents=False)
    assert dataclasses.replace(source).dataset == "owner/name"
    assert "asked" not in hub


def test_compressed_rows_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    buffer = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(buffer, closefd=False) as writer:
        for i in range(2000):
            writer.write(json.dumps({"text": f"{i} " * 50}).encode() + b"\n")
    path.write_bytes(buffer.getvalue())
    assert read(path) == [f"{i} " * 50 for i in range(2000)]


def test_the_source_of_the_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.py", "a/c.py", "test/t.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"raise SystemExit  # {name}")
    monkeypatch.setattr(texts.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert read("stdlib") == [f"raise SystemExit  # {name}" for name in ("a/c.py", "b.py")]


def test_a_shuffle_is_a_permutation_that_the_seed_decides(tmp_path: Path) -> None:
    rows = [f"{i} é \ud800" if i % 7 else "" for i in range(200)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    rows = [row.replace("\ud800", "\ufffd") for row in rows]  # half a surrogate pair is no character
    orders = [read(path, shuffle_seed=seed) for seed in (0, 0, 1)]
    assert all(sorted(order) == sorted(rows) for order in orders)
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != rows != orders[2]
    assert read(path) == rows


def test_a_streamed_data_set_is_shuffled_by_its_library(hub: dict[str, Any]) -> None:
    class Rows(list[dict[str, str]]):
        def shuffle(self, *, seed: int, buffer_size: int) -> list[dict[str, str]]:
            assert (seed, buffer_size) == (5, 10_000)
            return self[::-1]

    hub["answer"] = lambda: Rows([{"text": "a"}, {"text": "b"}])
    assert read("owner/name", shuffle_seed=5) == ["b", "a"]


def test_several_texts_have_options_of_their_own(tmp_path: Path, hub: dict[str, Any]) -> None:
    write(tmp_path / "a.jsonl", "body")
    hub["answer"] = lambda: iter([{"text": "hub"}])
    options = TextConfig(
        dataset=(f"{tmp_path / 'a.jsonl'}:2", "owner/name", "pydoc:0.5"),
        text_column=("body", "", "text"),
        split=("test",),
    )
    local, remote, python = open_sources(options)
    assert list(local.documents()) == ROWS
    assert list(remote.documents()) == ["hub"]
    assert hub["asked"][1]["split"] == "test"
    assert [source.choice.weight for source in (local, remote, python)] == [2, 1, 0.5]
    with pytest.raises(UsageError, match="--split: local files have no splits"):
        open_sources(dataclasses.replace(options, dataset=(str(tmp_path / "a.jsonl"), "pydoc"), text_column=("text",)))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_document_longer_than_the_limit_is_refused(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / f"data{suffix}", "t")
    longest = max(len(row) if suffix == ".parquet" else len(json.dumps({"t": row, "n": 0})) + 1 for row in ROWS)
    monkeypatch.setattr(local, "LONGEST", longest)
    assert read(path, text_column="t") == ROWS
    monkeypatch.setattr(local, "LONGEST", longest - 1)
    with pytest.raises(IncompatibleError, match=r"data\S* (line|row) [23]: a document should have at most"):
        read(path, text_column="t")


def test_a_text_file_or_a_column_larger_than_the_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("x" * 101)
    parquet.write_table(pyarrow.table({"text": ["x" * 300_000]}), tmp_path / "b.parquet", compression="zstd")
    assert len(read(tmp_path / "b.parquet")[0]) == 300_000
    monkeypatch.setattr(local, "LARGEST", 100)
    with pytest.raises(IncompatibleError, match=r"a\.txt: should be a file of at most 100 B, found 101 B: split it"):
        read(tmp_path / "a.txt")
    with pytest.raises(IncompatibleError, match=r"b\.parquet: .*'text' is 300 kB unpacked, in a file of .* 64 times"):
        read(tmp_path / "b.parquet")


def test_a_parquet_column_of_lists_is_refused_by_its_type(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": [["a"], ["b"]]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="holds list"):
        read(tmp_path / "a.parquet")


IDS = [[5, 6, 7], [], [9, 5]]
KNOWN = np.isin(np.arange(12), [5, 6, 7, 9])


def write_ids(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table({"ids": rows}), path)
    else:
        path.write_text("".join(json.dumps({"ids": row}) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("seed", [None, 3])
def test_columns_of_token_ids_are_documents_as_they_are(tmp_path: Path, suffix: str, seed: int | None) -> None:
    path = write_ids(tmp_path / f"ids{suffix}", [*IDS, None])
    source = open_source(config(path, token_column="ids"), seed, KNOWN)
    found = list(source.documents())
    assert all(ids.dtype == np.int32 for ids in found if isinstance(ids, np.ndarray))
    order = permutation(4, 3).tolist() if seed else range(4)
    assert [list(ids) for ids in found] == [[*IDS, []][i] for i in order]
    assert source.characters() is None


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("wrong", [-1, 8, 12, 2**40])
def test_a_token_that_is_not_the_models_is_named_with_its_row(tmp_path: Path, suffix: str, wrong: int) -> None:
    path = write_ids(tmp_path / f"ids{suffix}", [*IDS, [5, wrong]])
    where = "line 4" if suffix == ".jsonl" else "row 4"
    with pytest.raises(
        IncompatibleError, match=rf"{where}: column 'ids' holds token {wrong}, which is not among the 4 of"
    ):
        list(open_source(config(path, token_column="ids"), known=KNOWN).documents())


@pytest.mark.parametrize(
    ("row", "found"),
    [
        *(("text", "str$"), ([5, 1.5], "float within a list"), ([[5]], "list within a list"), (5, "int$")),
        *(([True], "bool within a list"), (["5"], "str within"), ([5, None], "NoneType within")),
    ],
)
def test_a_token_column_of_something_else_is_refused(tmp_path: Path, row: Any, found: str) -> None:
    path = write_ids(tmp_path / "ids.jsonl", [row])
    with pytest.raises(UsageError, match=f"should hold lists of token ids, found {found}"):
        list(open_source(config(path, token_column="ids"), known=KNOWN).documents())


def test_text_columns_of_token_ids_name_the_way_out(tmp_path: Path) -> None:
    path = write_ids(tmp_path / "ids.jsonl", IDS)
    with pytest.raises(UsageError, match="give --token-column ids"):
        read(path, text_column="ids")
    with pytest.raises(UsageError, match="--token-column"):
        read(path)


def test_what_has_no_columns_has_no_token_column(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    for name in (str(tmp_path / "a.txt"), "pydoc"):
        with pytest.raises(UsageError, match="has no columns"):
            list(open_source(config(name, token_column="ids"), known=KNOWN).documents())
    with pytest.raises(UsageError, match="give only one"):
        config("a.jsonl", token_column="ids", text_column="body")
