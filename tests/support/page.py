"""A report read back: its text, its tags and its data blocks."""

import base64
import json
import zlib
from html.parser import HTMLParser

import numpy as np

VOID = {"meta", "input", "image", "br"}


class Page(HTMLParser):
    """Text, tags and data blocks of a page; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.blocks: dict[str, tuple[dict[str, str | None], str]] = {}
        self.script = ""
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        attributes = self.attributes[-1][1] if self.attributes else {}
        if self.open[-1:] == ["script"]:
            if attributes.get("type") == "text/plain":
                self.blocks[str(attributes["id"])] = (attributes, data)
            else:
                self.script += data
        elif self.open[-1:] != ["style"]:
            self.text += data


def unpack(page: Page, block: str) -> dict[str, np.ndarray]:
    """What report.js' `unpack` does, in Python."""
    attributes, text = page.blocks[block]
    data = zlib.decompress(base64.b64decode(text))
    return {
        name: np.frombuffer(data[start:end], f"<{kind}")
        for name, kind, start, end in json.loads(str(attributes["data-index"]))
    }
