"""What names and records hold stays text on a terminal, in a model card and in a figure."""

import io
import sys

import pytest

from residscope.console import run_command
from residscope.errors import UsageError
from residscope.escape import figure_text, markdown, printable, printable_streams


def test_what_steers_a_terminal_is_shown_as_one_writes_it() -> None:
    assert printable("a\x1b[31m\x07\x9b\u202eb\r\tc\n") == "a\\x1b[31m\\x07\\x9b\\u202eb\\r\tc\n"
    assert printable("日本語 é") == "日本語 é"
    assert printable("\ud800") == "\\ud800"  # half of a pair, which JSON and pickles may hold and no file takes


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_no_command_sends_escapes_to_the_terminal_whoever_writes(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, stream, screen)

    def command() -> int:
        print("\x1b]0;title\x07", file=getattr(sys, stream))
        getattr(sys, stream).write("\rbar 50 %\x1b[2J")
        getattr(sys, stream).write("\n\x1b[A")  # as progress bars go up a line
        raise UsageError("no\nfile \x1b[1m")

    assert run_command("test", command) == 2
    assert getattr(sys, stream) is screen
    error = "test: error: no\\nfile \\x1b[1m\n" if stream == "stderr" else ""
    assert screen.getvalue() == "\\x1b]0;title\\x07\n\rbar 50 %\\x1b[2J\n\x1b[A" + error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<b>a & b</b>", "&#60;b&#62;a &#38; b&#60;/b&#62;"),
        ("[a](b)", "&#91;a&#93;(b)"),
        ("a | b\n\n# c", "a &#124; b &#35; c"),
        ("`a` *b* _c_ ~d~ \\ $e$ @f", "&#96;a&#96; &#42;b&#42; &#95;c&#95; &#126;d&#126; &#92; &#36;e&#36; &#64;f"),
        ("http://a.org www.a.org 1.5", "http&#58;//a.org www&#46;a.org 1.5"),
        ("- a", "&#45; a"),
        ("1. a", "1&#46; a"),
        ("\x1b[0m", "&#92;x1b&#91;0m"),
        (None, "None"),
        ("EleutherAI/pythia-70m: 0.05 of 40 (seed 3)", "EleutherAI/pythia-70m: 0.05 of 40 (seed 3)"),
    ],
)
def test_markdown_holds_no_markup(text: object, expected: str) -> None:
    assert markdown(text) == expected


def test_a_figure_takes_no_formula_and_hides_no_name() -> None:
    assert figure_text("a$b^$\x1b") == "a\\$b^\\$\\x1b"
    assert figure_text("_a") == " _a"


def test_a_stream_that_is_closed_takes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it after `>&-`
    monkeypatch.setattr(sys, "stderr", None)
    with printable_streams():
        print("a result")
        print("a warning", file=sys.stderr, flush=True)
    assert sys.stdout is None
