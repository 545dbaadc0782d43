"""`residscope plan`, and what it times on this machine (residscope/commands/calibrate.py)."""

import json
from pathlib import Path

import pytest
import transformers

from residscope.cli import main
from residscope.commands import calibrate
from residscope.commands.costs import Training
from residscope.commands.plan import PlanConfig, plan
from residscope.errors import UsageError
from tests.support.models import tiny_tokenizer


def test_the_papers_run_on_eight_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    """pythia-1b: 16 blocks of 12 d^2 + 13 d parameters (with norms and biases), 64 KiB a token; without a network."""
    command = [
        "plan",
        "--model",
        "pythia-1b",
        "--tokens",
        "1e9",
        "--n-latents",
        "131072",
        "--gpus",
        "8",
        "--gpu",
        "h100",
    ]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["block_parameters"] == 16 * (12 * 2048**2 + 13 * 2048)
    assert found["stored_bytes"] == 65_536 * 10**9
    assert found["vectors"] == 16 * 10**9
    assert found["flops"]["train"] == 2.0 * 16e9 * 131_072 * 2048
    stored, rolling, memory = (found["ways"][name] for name in ("stored", "rolling", "in_memory"))
    assert (stored["disk"], rolling["disk"], memory["disk"]) == (65.536e12, 50e9, 0)
    assert stored["together"] == pytest.approx(stored["harvest"] + stored["train"])
    assert rolling["together"] == max(rolling["harvest"], rolling["train"])
    assert sum(memory["cards"]) == 8
    assert main(command) == 0
    said = capsys.readouterr().out
    for words in ("not measured", "65.5 TB", "train: reading from the disk"):
        assert words in said


def test_this_machine_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2-135M, on what the timing gives: 1 ms a token and 2 s a step."""
    monkeypatch.setattr(calibrate, "token_seconds", lambda config, model: 1e-3)
    monkeypatch.setattr(calibrate, "step_seconds", lambda run, layers: (2.0, 10**9))
    found = plan(PlanConfig(model="pythia-14m", tokens=1e6, batch_size=60_000, disk_speed="1GB", epochs=3))
    stored = found["ways"]["stored"]
    assert stored["harvest"] == pytest.approx(10 + 1000)
    assert found["training"]["steps"] == 100
    assert stored["train"] == pytest.approx(10 + 3 * 200)
    assert found["ways"]["rolling"]["train"] == pytest.approx(10 + 200)  # each token once
    assert stored["bound"] == "harvest: the model's forward pass"


def test_what_is_timed_is_real(monkeypatch: pytest.MonkeyPatch) -> None:
    from residscope.commands.plan import model_config, shape_of

    monkeypatch.setattr(calibrate, "SECONDS", 0.0)
    config = model_config("pythia-14m")
    assert 0 < calibrate.token_seconds(config, shape_of(config, 64)) < 10
    seconds, memory = calibrate.step_seconds(Training(256, 4, 128, 5, 32), 3)
    assert 0 < seconds < 60
    assert memory > 24 * 256 * 32


def test_sequences_are_no_longer_than_the_model_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 has 1,024 positions."""
    monkeypatch.setattr(calibrate, "step_seconds", lambda run, layers: (2.0, 10**9))
    monkeypatch.setattr(calibrate, "SECONDS", 0.0)
    config = transformers.GPT2Config(n_embd=32, n_head=2, n_layer=2, vocab_size=10)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tiny_tokenizer(bos=False).save_pretrained(tmp_path)
    assert plan(PlanConfig(model=str(tmp_path), disk_speed="1GB"))["model"]["context"] == 1024
    with pytest.raises(UsageError, match=r"--context-length 1025: \S+ takes at most 1024 tokens"):
        plan(PlanConfig(model=str(tmp_path), context_length=1025))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--tokens 0", "--tokens should be at least 1, found 0"),
        ("--disk much", "--disk should be bytes such as 50GB, found 'much'"),
        ("--batch-size -5", "--batch-size should be at least 1, found -5"),
        ("--expansion-factor 0", "--expansion-factor should be at least 0.001, found 0"),
        ("--gpus -1", "--gpus should be 0 to 10,000, found -1"),
        ("--gpus 1000000000", "--gpus should be 0 to 10,000, found 1,000,000,000"),
        ("--k 99 --n-latents 9 --gpus 1", "--k 99: there are only 9 latents"),
        ("--n-latents 1000000000 --gpus 2", "--n-latents 1,000,000,000: takes"),
    ],
)
def test_what_cannot_be_planned_is_one_line(flags: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "pythia-14m", *flags.split()]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.strip().splitlines()) == 1
