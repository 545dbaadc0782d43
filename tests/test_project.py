"""Rules that hold for the whole tree: who imports whom, how large things are, what `--help` loads, what is packaged."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("residscope", "store", "harvest", "train", "analysis")

# What each package may import of the others: a package, or a module of it.
ALLOWED = {
    "residscope": {  # in the functions of its commands; see the test below
        "store",
        "harvest.model.blocks",
        "harvest.model.load",
        "harvest.model.names",
        "harvest.settings",
        "harvest.estimate",
        "harvest.result",
        "train.config",
        "harvest.config",
        "train.objective.recipes",
        "train.reporting.dry_run",
        "train.run",
    },
    "store": {"residscope"},
    "harvest": {"residscope", "store"},
    "train": {"residscope", "store"},
    "analysis": {
        "residscope",
        "store",
        "train.checkpoint",
        "train.hardware",
        "train.compare.pca",
        "train.reporting.convergence",
        "train.model",
        "train.kernels.interface",
        "train.formats.files",
        "harvest.model.blocks",
        "harvest.model.checks",
        "harvest.model.load",
        "harvest.model.names",
        "harvest.model.tokenizer",
        "harvest.options_file",
        "harvest.residual",
        "harvest.lens.translators",
    },
}
COMMAND_MODULES = ("info", "demo", "plan", "calibrate", "run")
COMMANDS = ("residscope.cli", "residscope.__main__", *(f"residscope.commands.{n}" for n in COMMAND_MODULES))
"""The top of the house, which may import the other packages; everything else in `residscope` is its ground floor."""
HEAVY = ("torch", "dask", "distributed", "transformers", "datasets", "zarr", "numpy", "pandas", "numba", "matplotlib")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


MODULES = {module_name(path): path for package in PACKAGES for path in source_files(package)}


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions; `from a import b` gives a.b where b is a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in MODULES else node.module)
    return found


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


def test_what_all_packages_stand_on_imports_none_of_them() -> None:
    for path in source_files("residscope"):
        if module_name(path) not in COMMANDS:
            ours = {module for module in imported_modules(path) if module.split(".")[0] in PACKAGES}
            assert all(module.startswith("residscope") for module in ours), f"{path.relative_to(ROOT)} imports {ours}"


def test_modules_import_each_other_in_no_circle() -> None:
    ends: set[str] = set()

    def follow(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above[above.index(module) :], module))
        if module not in ends:
            for imported in sorted(imported_modules(MODULES[module]) & MODULES.keys()):
                follow(imported, (*above, module))
            ends.add(module)

    for module in MODULES:
        follow(module, ())


@pytest.mark.parametrize("package", PACKAGES)
def test_only_a_command_line_imports_a_command_line(package: str) -> None:
    for path in source_files(package):
        clis = {m for m in imported_modules(path) if m.endswith(".cli") and m.split(".")[0] in PACKAGES}
        assert not clis or path.stem in ("cli", "__main__"), f"{path.relative_to(ROOT)} imports {clis}"


def test_the_store_knows_no_torch() -> None:
    for path in source_files("store"):
        assert not {m for m in imported_modules(path) if m.split(".")[0] in ("torch", "transformers")}, path


def test_no_module_is_named_after_a_top_level_package() -> None:
    for package in PACKAGES:
        assert not {p.stem for p in source_files(package)} & set(PACKAGES)


def test_a_room_is_no_larger_than_one_can_take_in() -> None:
    files = [
        p for package in PACKAGES for p in (ROOT / package).rglob("*") if p.suffix in (".py", ".html", ".css", ".js")
    ]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    long = {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > 400}
    assert not long, "split at its joints, or say less"
    folders = {path.parent for path in files}
    crowded = {str(f.relative_to(ROOT)): n for f in folders if (n := sum(path.parent == f for path in files)) > 16}
    assert not crowded, "files in one folder"
    said = re.search(r"([\d,]+) in all;", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert said
    most = int(said[1].replace(",", ""))
    assert sum(lines.values()) <= most, "take lines out elsewhere, or raise the number in CONTRIBUTING.md and say why"


def test_every_module_has_its_test_or_names_the_one_that_covers_it() -> None:
    """The test of its own name in the same place, or `Tested in ...` in its docstring: a path, or a file's name there
    or one folder up."""
    for path in MODULES.values():
        place = ROOT / "tests" / path.relative_to(ROOT).parent
        text = path.read_text(encoding="utf-8")
        if path.name == "__init__.py" or (place / f"test_{path.name}").exists():
            continue
        named = re.findall(r"(?:tests/[\w/]*)?test_\w+\.py", ast.get_docstring(ast.parse(text)) or "")
        assert named, f"{path.relative_to(ROOT)}: no test_{path.name}, so name the test that covers it in the docstring"
        for name in named:
            found = (ROOT / name).exists() or (place / name).exists() or (place.parent / name).exists()
            assert found, f"{path.relative_to(ROOT)}: {name}"


def test_text_files_are_utf8_whatever_the_locale() -> None:
    """Every file that is opened as text says its encoding."""
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            modes = [str(a.value) for a in node.args if isinstance(a, ast.Constant)]
            text = name in ("read_text", "write_text") or (
                name in ("open", "fdopen") and modes[-1:] in (["r"], ["w"], ["a"])
            )
            assert not text, f"{path.relative_to(ROOT)} line {node.lineno}"
            builtin = isinstance(node.func, ast.Name) and name == "open"
            assert not builtin, f"{path.relative_to(ROOT)} line {node.lineno}: open without an encoding"


@pytest.mark.parametrize(
    "module", ["harvest.cli", "harvest.lens.cli", "train.cli", "analysis.cli", "analysis.explore.cli", "residscope.cli"]
)
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
    for folder in {path.parent for path in MODULES.values()}:
        assert (folder / "__init__.py").exists(), folder


def test_make_asks_for_the_versions_of_python_that_the_package_takes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.11,<3.14"
    assert "(3, 11) <= v <= (3, 13)" in (ROOT / "Makefile").read_text(encoding="utf-8")
    minors = {line.rpartition(".")[2] for line in project["classifiers"] if line.startswith("Programming Language")}
    assert minors == {"11", "12", "13"}


def test_the_core_is_read_in_an_hour() -> None:
    tour = (ROOT / "docs/tour.md").read_text(encoding="utf-8")
    core = re.findall(r"^### \d+\. \[`([a-z_/]+\.py)`\]\(\.\./\1\)", tour, re.MULTILINE)
    assert len(core) == tour.count("\n### ") <= 14
    lines = sum(len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in core)
    assert lines <= 3000, "what is an option goes into a file of its own"
    order = [path.split("/")[0] for path in core]
    assert list(dict.fromkeys(order)) == ["harvest", "store", "train", "analysis"]
    assert order == sorted(order, key=list(dict.fromkeys(order)).index)
    named = re.findall(r"`((?:harvest|store|train|analysis|residscope)/[a-z_/]*(?:\.py)?)`", tour)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_the_picture_of_the_house_is_what_the_code_says() -> None:
    done = subprocess.run([sys.executable, "docs/house.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_path_that_is_named_is_there() -> None:
    """Paths of our files in docs, docstrings and comments; CHANGELOG.md and benchmarks/results tell of former ones."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    sources = [path for top in (*PACKAGES, "tests", "benchmarks") for path in (ROOT / top).rglob("*.py")]
    tops = "|".join((*PACKAGES, "tests", "benchmarks", "docs"))
    gone = {}
    for path in (*pages, *sources):
        if path.name != "CHANGELOG.md":
            text = path.read_text(encoding="utf-8")
            text = text.replace("(tim-lawson/mlsae, `analysis/variances.py`)", "")  # the reference's own
            named = set(re.findall(rf"(?<![\w./-])((?:{tops})/[\w/-]+\.(?:py|md|js|html|css|svg))\b", text))
            gone |= {name: str(path.relative_to(ROOT)) for name in named if not (ROOT / name).exists()}
    assert not gone
