"""The parts of the report that are files: templates, style and script of report_page/, and what a section is."""

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
    """A file of report_page/ as text."""
    return files("analysis").joinpath("report_page", name).read_text(encoding="utf-8")


def fill(name: str, **html: str) -> str:
    """A template of report_page/ with its $names replaced by HTML."""
    return Template(page_file(name)).substitute(html)
