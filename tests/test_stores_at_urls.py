"""The commands on a store at a URL, on a real S3 server: the same results as on a disk."""

import json
from pathlib import Path

import pytest

from residscope.cli import main
from residscope.urls import URL, as_path
from tests.support.models import tiny_model


def test_the_commands_give_what_they_give_on_a_disk(
    s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gpt2", tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The {i}th line has {i * i} words of its own.\n" for i in range(90)), encoding="utf-8")
    monkeypatch.setattr("store.meta._SHARD_BYTES", 1 << 17)

    def run(*words: str) -> dict[str, object]:
        assert main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    few = ["--no-report", "--no-examples", "--no-latent-logits", "--downstream-tokens", "0", "--no-nulls"]
    found = {}
    for name, place in (("disk", str(tmp_path / "acts.zarr")), ("url", f"{s3}/acts.zarr")):
        flags = ["--model", str(model), "--dataset", str(text), "--context-length", "64", "--device", "cpu"]
        made = run("harvest", *flags, "--out", place)
        assert run(["residscope", "verify"][1], place)["bad"] == []
        sae = tmp_path / name / "ckpt.pt"
        small = ["--n-latents", "64", "--k", "4", "--steps", "5", "--batch-size", "256"]
        run("train", "--store", place, "--out", str(sae), *small, "--device", "cpu")
        if name == "url":  # The autoencoder from there too.
            there = as_path(f"{s3}/ckpt.pt")
            assert isinstance(there, URL)
            there.put(sae.read_bytes())
        source = str(sae) if name == "disk" else f"{s3}/ckpt.pt"
        out = tmp_path / name / "analysis"
        run("analyze", "--store", place, "--sae", source, "--out", str(out), *few)
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        found[name] = made["content_hash"], made["shards"], sae.read_bytes(), summary["content_hash"]
        if name == "url":
            asked = run("harvest", *flags, "--out", f"{s3}/other.zarr", "--dry-run")
            assert (asked["fits"], asked["free_bytes"]) == (True, None)
            assert main(["train", "--store", place, "--out", f"{s3}/other.pt"]) == 2
            assert "should be on a disk" in capsys.readouterr().err
            assert main(["harvest", *flags, "--out", s3]) == 3
            assert "is not an activation store" in capsys.readouterr().err
    assert found["disk"] == found["url"]
    assert found["url"][1] > 1
