"""A small file takes little memory, whatever it claims: the sizes that it declares are compared before they are taken.

In a process of its own, whose largest resident size is looked at after each file. The limit is generous: the files
claim gigabytes.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
import zstandard
from pyarrow import parquet
from safetensors.torch import save

from tests.support.lenses import write_lens
from tests.support.saes import make_sae
from train.checkpoint import save_checkpoint
from train.formats.files import write_sae

LIMIT_MB = 400

READ = """
import resource, sys
from pathlib import Path
from harvest.lens.translators import load_lens
from harvest.text.local import file_documents
from residscope.errors import ResidscopeError
from train.formats.files import read_sae
import pyarrow.parquet

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

for path in map(Path, sys.argv[1:]):
    before = peak()
    try:
        if path.name.startswith("lens"):
            load_lens(str(path), model_id="owner/tiny", n_layers=4, d_model=20_000)
        elif path.suffix in (".pt", "") or path.name.endswith(".safetensors"):
            read_sae(path)
        else:
            sum(1 for _ in file_documents([path], "text"))
        said = "read"
    except ResidscopeError as error:
        said = f"exit {error.exit_code}"
    print(path.name, said, peak() - before)
"""


def packed() -> bytes:
    """A line of 600 MB of one letter."""
    packer = zstandard.ZstdCompressor().compressobj()
    return b"".join(packer.compress(b"a" * (1 << 20)) for _ in range(600)) + packer.flush()


def checkpoint(folder: Path, change: Callable[[Any], Any]) -> Path:
    path = folder / "expanded.pt"
    save_checkpoint(path, make_sae(), store={}, trainer={})
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


def expand(content: Any) -> None:
    content["config"].update(d_model=20_000, n_latents=20_000)
    for name in ("W_enc", "W_dec"):
        content["state_dict"][name] = torch.zeros(1).expand(20_000, 20_000)
    content["state_dict"]["b_pre"] = torch.zeros(20_000)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    (tmp_path / "a.jsonl.zst").write_bytes(packed())
    same = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100), pyarrow.array(["x" * (6 << 20)]))
    parquet.write_table(pyarrow.table({"text": same}), tmp_path / "c.parquet", compression="zstd")
    expanded = checkpoint(tmp_path, expand)
    lens = write_lens(tmp_path / "lens", d_model=2)
    config = json.loads((lens / "config.json").read_text())
    (lens / "config.json").write_text(json.dumps(config | {"d_model": 20_000}))
    torch.save({f"{i}.weight": torch.zeros(1).expand(20_000, 20_000) for i in range(4)}, lens / "params.pt")
    header = json.dumps({"a": {"dtype": "F32", "shape": [20_000, 20_000], "data_offsets": [0, 1_600_000_000]}}).encode()
    foreign = tmp_path / "foreign"
    write_sae(make_sae(), foreign, "mlsae")
    (foreign / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (tmp_path / "d.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + save({"a": torch.zeros(2)})[8:])
    return [tmp_path / "a.jsonl.zst", tmp_path / "c.parquet", expanded, lens, foreign, tmp_path / "d.safetensors"]


def test_small_files_that_claim_gigabytes_take_little_memory(files: list[Path]) -> None:
    done = subprocess.run([sys.executable, "-c", READ, *map(str, files)], capture_output=True, text=True, check=True)
    found = [line.split(" ") for line in done.stdout.splitlines()]
    for (name, said, *rest), path in zip(found, files, strict=True):
        assert name == path.name
        assert (said, rest[0]) == ("exit", "3") or name == "c.parquet"
        assert int(rest[-1]) < LIMIT_MB, done.stdout
