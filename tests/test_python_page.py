"""What docs/python.md and docs/notebook.ipynb show does run: every block and cell, in order, on a tiny random model."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import tiny_model

DOCS = Path(__file__).parent.parent / "docs"
LESS = "pca=False, nulls=False, intervals=False, redundancy=False, report=False, downstream_tokens=0"
"""Of an analysis is left out, to be quick."""


def test_every_block_of_the_page_and_then_every_cell_of_the_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, text = tiny_model("llama", tmp_path / "tiny"), tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x\n\nonce upon a time there was a return of the king\n" * 40)
    names: dict[str, Any] = {}
    page = (DOCS / "python.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        small = block.replace('"smollm2-135m"', repr(str(folder))).replace('"pydoc"', repr(str(text)))
        small = small.replace("20_000", "2_000, context_length=24").replace("expansion_factor=4", "expansion_factor=2")
        small = small.replace('out=Path("ckpt.analysis")', f'out=Path("ckpt.analysis"), {LESS}')
        exec(small, names)
    assert names["out"].x_hat.shape == (64, names["sae"].config.d_model)
    assert set(names["effect"]) >= {"kl_last", "next_true", "next_changed", "text_true", "text_changed"}
    assert not any(block._forward_hooks for block in names["analysis"].live.prompted.model.blocks)
    cells = json.loads((DOCS / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    names = {}
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)  # stripped
        exec("".join(cell["source"]), names)
    assert names["effect"]["kl_last"] >= 0
