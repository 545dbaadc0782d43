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
"""Control characters except tab and LF, zero-width characters, those that change the text direction, and surrogates."""

_MARKUP = re.compile(r"[&<>`\[\]*_|\\~#$@]|:(?=/)|(?<=[wW]{3})\.|(?<=\d)[.)](?=\s)|^[-+=]")
"""What starts Markdown markup, HTML, a bare link, or a list item."""


def printable(text: str) -> str:
    """`text` with characters that would control a terminal escaped as in Python: ESC becomes \\x1b."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def markdown(value: object) -> str:
    """`value` as plain text in one line of Markdown: characters that may be markup are escaped, like &#60;."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", printable(" ".join(str(value).split())))


def figure_text(text: str) -> str:
    """`text` as plain text of a figure: no formula between dollar signs, no leading _ (which hides a legend label)."""
    return " " * text.startswith("_") + printable(text).replace("$", r"\$")


@contextlib.contextmanager
def printable_streams() -> Iterator[None]:
    """Make everything written to stdout and stderr `printable`. Output to a closed stream (`>&-`) is discarded, and so
    is stderr once it fails (a full disk, `| head`): no work is lost because a message cannot be shown."""
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
        """Progress bars start with a carriage return or move up lines; other control characters are escaped."""
        begin = text[: len(text) - len(text.lstrip("\r"))]
        shown = text if not text.strip("\n\x1b[A") else begin + printable(text[len(begin) :])
        return self._named(lambda: self._stream.write(shown))

    def flush(self) -> None:
        """Like `write`, errors name the stream."""
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
