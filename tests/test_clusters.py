"""The files of docs/clusters: well formed, and in step with the commands."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from analysis.config import AnalyzeConfig
from harvest.config import HarvestConfig
from residscope.options import parse_options
from train.config import TrainConfig

FOLDER = Path(__file__).parent.parent / "docs/clusters"
CONFIGS: dict[str, Any] = {"harvest": HarvestConfig, "train": TrainConfig, "analyze": AnalyzeConfig}


def parse(command: str, words: list[str]) -> Any:
    """As the command does, with what it must be given."""
    return parse_options(CONFIGS[command], words, prog=command, description="")


def containers(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a pod's template, where there is one."""
    spec = document["spec"].get("template", {}).get("spec", {})
    return [*spec.get("initContainers", ()), *spec.get("containers", ())]


def test_the_job_is_a_valid_shell_script() -> None:
    subprocess.run(["bash", "-n", str(FOLDER / "slurm.sh")], check=True)


@pytest.mark.parametrize("command", CONFIGS)
def test_the_jobs_flags_exist(command: str) -> None:
    text = (FOLDER / "slurm.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = re.findall(rf"(?:cluster|-m residscope) {command} (.*)", text)
    (defaults,) = re.findall(rf"^{command.upper()}_FLAGS=\$\{{{command.upper()}_FLAGS:-(.*)\}}$", text, re.MULTILINE)
    words = re.sub(r"\$\w+_FLAGS", defaults, line).replace('"', "").split()
    if "cluster " + command in text:
        words += ["--scheduler", "tcp://host:8786"]
    parse(command, words)


def test_the_manifests_flags_exist() -> None:
    documents = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text(encoding="utf-8")))
    commands = [container["command"] for document in documents for container in containers(document)]
    ours = {command: words for command, *words in commands if command in CONFIGS}
    assert set(ours) == set(CONFIGS)
    for command, words in ours.items():
        parse(command, words)
    services = {document["metadata"]["name"] for document in documents if document["kind"] == "Service"}
    for address in re.findall(r"tcp://([\w-]+):8786", " ".join(word for words in commands for word in words)):
        assert address in services


def test_every_volume_of_the_manifest_is_declared() -> None:
    for document in yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text(encoding="utf-8")):
        declared = {
            volume["name"] for volume in document["spec"].get("template", {}).get("spec", {}).get("volumes", ())
        }
        used = {mount["name"] for one in containers(document) for mount in one.get("volumeMounts", ())}
        assert used == declared
