"""Rules that hold for the whole tree: who imports whom, what `--help` loads, and what is packaged."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("store", "harvest", "train", "analysis")

# What each package may import of the others: a package, or a module of it.
ALLOWED = {
    "store": set(),
    "harvest": {"store"},
    "train": {"store"},
    "analysis": {
        "store",
        "train.sae",
        "train.screen",
        "train.kernels",
        "train.formats",
        "harvest.checks",
        "harvest.models",
        "harvest.options_file",
        "harvest.residual",
        "harvest.lens",
    },
}
HEAVY = ("torch", "dask", "distributed", "transformers", "datasets", "zarr", "numpy", "pandas", "numba", "matplotlib")


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions; `from a import b` gives a.b where b is a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                is_module = (ROOT / (submodule.replace(".", "/") + ".py")).exists()
                found.add(submodule if is_module else node.module)
    return found


def source_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_the_design_allows(package: str) -> None:
    files = source_files(package)
    assert files
    for path in files:
        for module in imported_modules(path):
            top = module.split(".")[0]
            if top not in PACKAGES or top == package:
                continue
            allowed = ALLOWED[package]
            assert top in allowed or module in allowed, f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("package", PACKAGES)
def test_nobody_imports_a_command_line(package: str) -> None:
    for path in source_files(package):
        clis = {m for m in imported_modules(path) if m.endswith(".cli") and m.split(".")[0] in PACKAGES}
        assert not clis, f"{path.relative_to(ROOT)} imports {clis}"


def test_the_store_knows_no_torch() -> None:
    for path in source_files("store"):
        assert not {m for m in imported_modules(path) if m.split(".")[0] in ("torch", "transformers")}, path


def test_no_module_is_named_after_a_top_level_package() -> None:
    for package in PACKAGES:
        assert not {p.stem for p in source_files(package)} & set(PACKAGES)


@pytest.mark.parametrize("module", ["harvest.cli", "harvest.fit_cli", "train.cli", "analysis.cli", "store.cli"])
def test_help_loads_nothing_heavy(module: str) -> None:
    code = (
        f"import sys; import {module} as cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit as e:\n    assert not e.code\n"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout, done.stdout[-200:]
    assert "usage:" in done.stdout


def test_every_package_is_typed_and_packaged() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == set(PACKAGES)
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").exists()
        assert (ROOT / package / "__init__.py").exists()


def test_make_asks_for_the_versions_of_python_that_the_package_takes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.11,<3.14"
    assert "(3, 11) <= v <= (3, 13)" in (ROOT / "Makefile").read_text(encoding="utf-8")
    minors = {line.rpartition(".")[2] for line in project["classifiers"] if line.startswith("Programming Language")}
    assert minors == {"11", "12", "13"}
