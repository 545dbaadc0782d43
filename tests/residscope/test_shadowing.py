"""With a user's own store.py, train.py, harvest.py and analysis.py in the working folder, the commands and
`import residscope` find their own packages all the same, in worker processes too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
NAMES = ("store", "train", "harvest", "analysis")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of modules with our packages' names, none of which can be imported."""
    folder = tmp_path_factory.mktemp("shadowing")
    for name in NAMES:
        (folder / f"{name}.py").write_text("raise RuntimeError('the file of the user was imported')\n")
    return folder


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Python in this folder, which comes before everything else on its path."""
    paths = os.pathsep.join((str(folder), str(ROOT)))
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_folder_shadows_our_packages(folder: Path) -> None:
    """Otherwise nothing here would show anything."""
    for name in NAMES:
        assert "the file of the user was imported" in run(folder, "-c", f"import {name}").stderr


@pytest.mark.parametrize("command", ["harvest", "train", "analyze"])
def test_the_commands_start(folder: Path, command: str) -> None:
    """As the installed scripts do, and as `python -m residscope`."""
    script = f"import sys; sys.argv = [{command!r}, '--help']; from residscope.cli import {command}; {command}()"
    for words in (("-c", script), ("-m", "residscope", command, "--help")):
        done = run(folder, *words)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"usage: {command} "), done.stdout


@pytest.mark.parametrize("command", ["info", "verify", "compare", "fit-lens", "convert", "demo"])
def test_the_umbrellas_commands_start(folder: Path, command: str) -> None:
    done = run(folder, "-m", "residscope", command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage:" in done.stdout


def test_the_library_is_imported(folder: Path) -> None:
    code = "import residscope; print(residscope.ActivationStore, residscope.TrainConfig, residscope.HarvestConfig)"
    done = run(folder, "-c", code)
    assert done.returncode == 0, done.stderr
    assert "store.activations.ActivationStore" in done.stdout


def test_a_module_of_the_user_that_is_imported_already_is_named(tmp_path: Path) -> None:
    (tmp_path / "store.py").write_text("mine = True\n")
    code = "import store, residscope; assert store.mine; residscope.TrainConfig; residscope.ActivationStore"
    done = run(tmp_path, "-c", code)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("ImportError"))
    assert f"{tmp_path / 'store.py'} was already imported under that name" in line
    assert line.endswith("import residscope first, or rename that file")
    assert run(tmp_path, "-c", "import residscope, store; store.ActivationStore").returncode == 0


SPAWN = """
import residscope.cli

if __name__ == "__main__":
    import multiprocessing

    from analysis.report.data import finite

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print("the worker gives", pool.apply(finite, [1]))
"""


def test_a_worker_process_finds_our_packages(folder: Path) -> None:
    """Started by a script that imports residscope first, as ours do; the worker imports the function by its name."""
    (folder / "started.py").write_text(SPAWN)
    done = run(folder, "started.py")
    assert "the worker gives 1.0" in done.stdout, done.stderr
