"""The controls, end to end through the commands: a model, its untrained twin, the same through a tuned lens, another
depth and a single-layer baseline, side by side in one table and one figure."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.cli import main as analyze
from harvest.cli import main as harvest
from harvest.lens.cli import main as fit_lens
from tests.support.models import tiny_model
from train.cli import main as train

DOCUMENTS = [f"{i * i} words of document {i}, and its {'streams'[: i % 7 + 1]} run on." for i in range(40)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Folders of five analyses."""
    root = tmp_path_factory.mktemp("controls")
    model, other = str(tiny_model("gpt_neox", root / "model")), str(tiny_model("llama", root / "other"))
    texts = root / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    data = ["--dataset", str(texts), "--context-length", "32", "--max-tokens", "1000"]
    stores = {name: root / f"{name}.zarr" for name in ("plain", "untrained", "lens", "deeper")}

    def made(name: str, *words: str) -> None:
        assert harvest([*words, *data, "--out", str(stores[name])]) == 0

    made("plain", "--model", model)
    made("untrained", "--model", model, "--random-init")
    made("deeper", "--model", other)
    lens = str(root / "translators")
    fitted = ["--model", model, "--store", str(stores["plain"]), "--method", "ridge", "--eval-tokens", "64"]
    assert fit_lens([*fitted, "--out", lens]) == 0
    made("lens", "--model", model, "--lens", lens)
    found = {}
    for name, store, more in (
        *((name, store, []) for name, store in stores.items()),
        ("layer-1", stores["plain"], ["--layers", "1"]),
    ):
        sae = str(root / f"{name}.pt")
        shape = ["--expansion-factor", "2", "--k", "4", "--steps", "4", "--batch-size", "64", "--kernels", "torch"]
        assert train(["--store", str(store), *shape, "--validation-fraction", "0.2", "--out", sae, *more]) == 0
        found[name] = root / f"{name}.analysis"
        light = ["--no-report", "--no-examples", "--no-redundancy", "--no-latent-logits", "--downstream-tokens", "96"]
        origin = ["--model", other if name == "deeper" else model, *(["--lens", lens] if name == "lens" else [])]
        assert analyze(["--store", str(store), "--sae", sae, *origin, *light]) == 0
    return found


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.slow
def test_a_model_and_its_controls_are_one_table_and_one_figure(runs, tmp_path, capsys):
    assert analyze(["--compare", *map(str, runs.values()), "--out", str(tmp_path)]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.split("\n\n")[0].splitlines()[2:]}
    assert rows["untrained.analysis"].endswith(", untrained")
    assert rows["lens.analysis"].endswith(", tuned lens")
    assert "layer 1 only" in rows["layer-1.analysis"]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".parquet", ".png", ".svg"}

    table = pd.read_parquet(tmp_path / "compare.parquet")
    mass = table[table["weighting"] == "mass"].set_index("run")
    assert mass["random_init"].astype(bool).to_dict() == {f"{n}.analysis": n == "untrained" for n in runs}
    assert mass["lens"].notna().to_dict() == {f"{n}.analysis": n == "lens" for n in runs}
    for name, folder in runs.items():
        summary, row = summary_of(folder), mass.loc[f"{name}.analysis"]
        found, depth = summary["variance"]["mass"], summary["n_layers"]
        assert depth == {"deeper": 4, "layer-1": 1}.get(name, 3)
        for column, part in {"fvu": "reconstruction", "delta_ce": "downstream", "kl": "downstream"}.items():
            assert row[column] == summary[part][column]
            low, high = summary[part]["ci95"].get(column) or (None, None)
            assert low is None or (row[f"{column}_low"], row[f"{column}_high"]) == (low, high)
        if depth == 1:
            assert found["total"] == pytest.approx(0, abs=1e-12)
            continue
        assert row["total_normalised"] == pytest.approx(found["total"] / ((depth**2 - 1) / 12))
        assert row["within_token_low"] <= found["within_token"] <= row["within_token_high"]
        for null in ("layers_permuted", "tokens_permuted"):
            ratio = summary["nulls"][null]["ratio"]["variance"]["mass"]
            assert row[f"within_token_over_{null}"] == ratio["within_token"]
            assert ratio["within_token"] * summary["nulls"][null]["variance"]["mass"]["within_token"] == pytest.approx(
                found["within_token"]
            )


@pytest.mark.slow
def test_controls_differ_only_in_what_they_control(runs):
    plain, twin, lens = (summary_of(runs[name]) for name in ("plain", "untrained", "lens"))
    for other in (twin, lens):
        assert other["variance"] != plain["variance"]
        for key in ("n_tokens", "n_layers", "n_latents", "split"):
            assert other[key] == plain[key]
    # The true run goes through no lens: the untouched model's cross-entropy is the same with one and without.
    assert lens["downstream"]["true_ce"] == pytest.approx(plain["downstream"]["true_ce"], rel=1e-6)
    assert twin["downstream"]["true_ce"] != pytest.approx(plain["downstream"]["true_ce"], rel=1e-3)
