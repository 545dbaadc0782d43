"""Text from names, records, models and libraries, escaped for where it goes: a terminal, Markdown, or a figure.

HTML has `html.escape`; JSON and TOML have their writers.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
"""Control characters, those without width or that turn the direction of writing, halves of a pair; not tab and LF."""

_MARKUP = re.compile(r"[&<>`\[\]*_|\\~#$@]|:(?=/)|(?<=[wW]{3})\.|(?<=\d)[.)](?=\s)|^[-+=]")
"""What starts markup in Markdown, HTML in it, a link without brackets, or an item of a list."""


def printable(text: str) -> str:
    """`text` with what would steer a terminal as one writes it in Python: an escape is \\x1b."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def markdown(value: object) -> str:
    """`value` as plain words in one line of Markdown, whatever it holds: what may be markup is written as &#60;."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", printable(" ".join(str(value).split())))


def figure_text(text: str) -> str:
    """`text` as plain words of a figure: no formula between dollar signs, no label that the legend leaves out."""
    return " " * text.startswith("_") + printable(text).replace("$", r"\$")


@contextlib.contextmanager
def printable_streams() -> Iterator[None]:
    """Have stdout and stderr take `printable` text only, whoever writes; one that is closed (`>&-`) takes all, and so
    does a stderr that fails (a full disk, `| head`): no work is lost for want of a place to talk of it."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (  # type: ignore[assignment]
        _Printable(stream or Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 (open as long as the process)
        for stream in streams
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


class _Printable:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Progress bars begin with a carriage return, or go lines up; nothing else may."""
        begin = text[: len(text) - len(text.lstrip("\r"))]
        shown = text if not text.strip("\n\x1b[A") else begin + printable(text[len(begin) :])
        return self._named(lambda: self._stream.write(shown))

    def flush(self) -> None:
        """An error names the stream, as one of `write` does."""
        self._named(self._stream.flush)

    def _named(self, do: Callable[[], Any]) -> Any:
        try:
            return do()
        except OSError as error:
            if self is not sys.stderr:
                raise OSError(error.errno, error.strerror, getattr(self._stream, "name", None)) from None
            self._stream = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (open as long as the process)
            return 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
