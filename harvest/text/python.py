"""Text that comes with Python: its documentation, and its standard library's source.

How: files are read and parsed, and no module is run; in sorted order, the same everywhere for one version of Python.
Tested in tests/harvest/text/test_sources.py.
"""

import ast
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")


def pydoc_documents() -> Iterator[str]:
    """The help topics of `pydoc`, then the docstrings of each standard library module that has any."""
    from pydoc_data import topics

    for name in sorted(topics.topics):
        yield topics.topics[name]
    yield from filter(None, map(_docstrings, _modules()))


def stdlib_documents() -> Iterator[str]:
    """The source of each standard library module."""
    for path in _modules():
        yield path.read_text(encoding="utf-8", errors="replace")


def _modules() -> Iterator[Path]:
    library = sysconfig.get_paths()["stdlib"]
    found: list[Path] = []
    for folder, below, files in os.walk(library):
        below[:] = [name for name in below if name not in _LEFT_OUT]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    yield from sorted(found, key=lambda path: path.parts)


def _docstrings(path: Path) -> str:
    """The docstrings of a source file, in order, with a blank line between them; empty where there are none."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ""
    found: list[tuple[int, str]] = []
    left: list[ast.AST] = [tree]
    while left:  # Statements only: nothing else has a docstring, and a walk over all of the tree takes twice the time.
        node = left.pop()
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            found.append((getattr(node, "lineno", 0), text))
        for field in _BLOCKS:
            left.extend(getattr(node, field, ()))
    return "\n\n".join(text for _, text in sorted(found, key=lambda place: place[0]))
