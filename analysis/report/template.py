"""The parts of the report that are files: templates/ (HTML), assets/ (style and scripts), and what a section is."""

from importlib.resources import files
from string import Template
from typing import NamedTuple


class Section(NamedTuple):
    """A part of the page, named in its table of contents."""

    anchor: str
    """Its id: what follows # in a link to it."""

    title: str
    """Heading, plain text."""

    body: str
    """HTML."""


def page_file(name: str) -> str:
    """A file of templates/ or assets/ as text."""
    folder = "templates" if name.endswith(".html") else "assets"
    return files("analysis.report").joinpath(folder, name).read_text(encoding="utf-8")


def fill(name: str, **html: str) -> str:
    """A template of templates/ with its $names replaced by HTML."""
    return Template(page_file(name)).substitute(html)
