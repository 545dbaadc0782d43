"""What a user sees when something goes wrong: one line, the right exit code, no traceback."""

import errno
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from residscope import console
from residscope.console import counted, human_bytes, human_seconds, progress, ranges, run_command, stop_on_signals
from residscope.errors import IncompatibleError, Interrupted, ResidscopeError, UsageError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ResidscopeError("it failed"), 1),
        (UsageError("it failed"), 2),
        (IncompatibleError("it failed"), 3),
        (Interrupted("it failed"), 130),
    ],
)
def test_a_users_error_is_one_line_and_an_exit_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise error

    assert run_command("tool", command) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", "tool: error: it failed\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")  # noqa: PTH110
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_standard_output_is_named(unbuffered: str) -> None:
    code = "from residscope.console import run_command; raise SystemExit(run_command('tool', lambda: print(1)))"
    with open("/dev/full", "w", encoding="utf-8") as full:  # noqa: PTH123
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("tool: error: No space left on device: <stdout>. Free some space")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")  # noqa: PTH110
@pytest.mark.parametrize("where", ["full", "gone"])
def test_no_work_is_lost_where_standard_error_fails(where: str) -> None:
    code = """if True:
        import sys
        from tqdm import tqdm
        from residscope.console import run_command
        from residscope.errors import UsageError
        def command():
            for _ in tqdm(range(5), mininterval=0):
                print("words", file=sys.stderr)
            print("done")
            raise UsageError("it failed")
        raise SystemExit(run_command("tool", command))
    """
    read, gone = os.pipe()
    os.close(read)
    with open("/dev/full" if where == "full" else gone, "w", encoding="utf-8") as stderr:  # noqa: PTH123
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=stderr, text=True)
    assert (done.returncode, done.stdout) == (2, "done\n")


def test_a_pipe_that_breaks_is_no_success_but_that_of_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    assert run_command("tool", command) == 1
    assert capsys.readouterr().err.startswith("tool: error: Broken pipe. The process that reads it has ended: run the")
    code = (
        "from residscope.console import run_command; raise SystemExit(run_command('tool', lambda: print('x' * 10**6)))"
    )
    shown = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{code}" | head -c 1; echo ${{PIPESTATUS[0]}}'],
        capture_output=True,
        text=True,
    )
    assert (shown.stdout, shown.stderr) == ("x0\n", "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_results_print_on_a_terminal_of_any_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it cannot show is escaped; \\udcff is a byte of a file name that is not UTF-8."""
    text = "na\u00efve \u65e5 \udcff"
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))

    def command() -> None:
        print(text)
        raise ResidscopeError(text)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        assert run_command("tool", command) == 1
    shown = [stream.buffer.getvalue() for stream in (out, err) if stream.flush() is None]  # type: ignore[attr-defined]
    expected = text.encode(encoding, "backslashreplace")
    assert shown == [expected + b"\n", b"tool: error: " + expected + b"\n"]


def test_a_full_disk_is_one_line_with_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "acts.zarr/x")

    assert run_command("tool", command) == 1
    err = capsys.readouterr().err
    assert "No space left" in err
    assert "acts.zarr/x" in err
    assert "continue where they stopped" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/full/tmp', '/var/tmp']"),
    ],
)
def test_a_full_disk_without_a_file_names_the_folder_of_temporary_files(
    error: OSError, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", "/full/tmp")

    def command() -> None:
        raise error

    assert run_command("tool", command) == 1
    err = capsys.readouterr().err
    assert "/full/tmp" in err
    assert "set TMPDIR to a folder with room" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "code",
    [errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EFBIG, errno.EEXIST, errno.ELOOP],
)
def test_a_path_that_cannot_be_is_one_line_that_names_it(code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise OSError(code, os.strerror(code), "/proc/out")

    assert run_command("tool", command) == 1
    err = capsys.readouterr().err
    assert f"{os.strerror(code)}: /proc/out. " in err
    assert err.count("\n") == 1


def test_a_link_to_itself_is_one_line_however_python_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise RuntimeError("Symlink loop from '/proc/out'")  # pathlib's own, before 3.13

    assert run_command("tool", command) == 1
    assert f"tool: error: {os.strerror(errno.ELOOP)}: /proc/out. A link leads" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes.\nException raised"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
)
def test_memory_that_is_refused_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise error

    assert run_command("tool", command) == 1
    err = capsys.readouterr().err
    assert err.startswith("tool: error: not enough memory (")
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [ZeroDivisionError(), RuntimeError("a bug"), FileNotFoundError(errno.ENOENT, "bug")])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    def command() -> None:
        raise error

    with pytest.raises(type(error)):
        run_command("tool", command)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_acts(signum: signal.Signals) -> None:
    before = signal.signal(signum, signal.default_int_handler)  # SIGINT is ignored where a shell runs this behind
    try:
        with stop_on_signals() as stopped:
            assert not stopped()
            os.kill(os.getpid(), signum)
            assert stopped()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signum)
        assert signal.getsignal(signum) is signal.default_int_handler
    finally:
        signal.signal(signum, before)


def test_ranges() -> None:
    assert ranges([3]) == "3"
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert ranges([0, 1, 2, 5, 7, 8], ", ") == "0-2, 5, 7-8"


def test_units() -> None:
    assert [human_bytes(n) for n in (0, 999, 34_560, 655e9)] == ["0 B", "999 B", "34.6 kB", "655 GB"]
    assert [human_seconds(s) for s in (0.5, 42, 200, 7500)] == ["0.5 s", "42 s", "3 min 20 s", "2 h 05 min"]
    assert [counted(n, "fault") for n in (0, 1, 2000)] == ["0 faults", "1 fault", "2,000 faults"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_at_once_is_noted(monkeypatch: pytest.MonkeyPatch, signum: signal.Signals) -> None:
    set_handler = signal.signal

    def with_signal(number: int, handler):  # type: ignore[no-untyped-def]
        before = set_handler(number, handler)
        if number == signum and handler is not before and not seen:
            seen.append(number)
            signal.raise_signal(number)
        return before

    seen: list[int] = []
    monkeypatch.setattr(signal, "signal", with_signal)
    with stop_on_signals() as stopped:
        assert stopped()


def test_an_interrupt_that_python_wraps_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise RuntimeError("Error calling __set_name__") from KeyboardInterrupt()

    assert run_command("tool", command, interrupted="stopped") == 130
    assert capsys.readouterr().err == "tool: error: stopped\n"


def test_sigterm_is_an_interrupt_with_its_line_and_code(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run_command("tool", lambda: os.kill(os.getpid(), signal.SIGTERM), interrupted="stopped") == 130
    assert capsys.readouterr().err == "tool: error: stopped\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_off_a_terminal_a_bar_is_a_plain_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("harvest", "tok", 2000) as bar:
        bar.update(1000)
    assert capsys.readouterr().err == ""  # done within half a minute
    monkeypatch.setattr(console, "_LOG_SECONDS", 0.0)
    with progress("harvest", "tok", 2000) as bar:
        bar.update(1000)
    err = capsys.readouterr().err
    assert "\r" not in err
    assert err.splitlines()[0].startswith("harvest: 0 %, 0.00 of 2.00k tok, ")
    assert err.splitlines()[-1].startswith("harvest: 50 %, 1.00k of 2.00k tok, ")


def test_signals_are_not_taken_in_another_thread() -> None:
    found = []

    def work() -> None:
        with stop_on_signals() as stopped:
            found.append(stopped())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def test_a_working_folder_that_is_gone_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder := tmp_path / "a").mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert run_command("train", lambda: pytest.fail("it starts")) == 2
    assert capsys.readouterr().err == "train: error: the working folder is gone or cannot be read: change to another\n"
