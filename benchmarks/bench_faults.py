"""What faults do to a store that `harvest` makes: kills, full and read-only disks, signals, two at once, bad bytes.

    python benchmarks/bench_faults.py [--runs N] [--flips N] [--seed N] [--only FAULT ...]

How: a tiny random model is harvested without a fault, for reference. Then each fault is done to that harvest N times,
at a random moment of the phase in question, in a process of its own (a fork of this one, which has loaded all that is
slow): a SIGKILL, a disk that is full (a tmpfs of our own; needs root), folders that can no longer be written to, a
signal, a second harvest. What is left may hold nothing that a reader would take for whole and is not; then the same
command runs to its end, and the store must have the reference's bytes, every one, with nothing beside it. Phases: plan
is the making of the store, commit the writing of a shard, fill all between. Then bits are flipped and ends cut off
in random files of the store: a reader must refuse it or read the right numbers. At last the commands that write a
folder of files (convert, fit-lens, analyze and the two comparisons) are killed N times each, half of them at a random
moment and half at a random call that changes the disk; and meet a full disk at such a call, a fifth as often: the same
command then ends with the bytes of an undisturbed run, or says that they are there.

Exit code 1 when anything was lost, wrong or silently read. What it does not do: cut the power (the tests have every
step that is synced, in order: tests/store/test_faults.py), or measure speed.
"""

import argparse
import contextlib
import errno
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Its threads would be missing in our forks, which would wait for them.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

import harvest.cli
import harvest.run
import harvest.settings
from residscope.errors import ResidscopeError
from store.activations import ActivationStore
from store.care.verify import verify
from tests.support.faults import count_down, everything, files_of, harmless, random_fault
from tests.support.models import tiny_model

CHUNK, SHARD = 32, 96
PHASES = ("plan", "fill", "commit")
FAULTS = ("kills", "full_disk", "read_only", "signals", "two_at_once", "bad_bytes", "folders")
DISK_BYTES = 24 << 20  # Above the 16 MiB that harvest wants to be free at the start.

Action = Callable[[str, int], None]


class Ended(NamedTuple):
    """A harvest that has ended."""

    code: int
    """Exit code; -9 when killed."""
    phase: str
    """The last phase that it was in; "" before the plan."""
    words: str
    """What it said on stderr."""


class Child:
    """A harvest in a process of its own, which tells its phases as it goes through them."""

    def __init__(self, arguments: list[str], action: Action) -> None:
        """action: called in the child at the begin of each phase, with its name and how many there were before."""
        reader, writer = os.pipe()
        self._words = tempfile.TemporaryFile()  # noqa: SIM115
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            os.dup2(self._words.fileno(), 1)
            os.dup2(self._words.fileno(), 2)
            os._exit(self._run(arguments, writer, action))
        os.close(writer)
        self._reader = reader
        self._phases = ""

    @staticmethod
    def _run(arguments: list[str], writer: int, action: Action) -> int:
        counts: Counter[str] = Counter()

        def enter(phase: str) -> None:
            os.write(writer, phase[0].encode())
            action(phase, counts[phase])
            counts[phase] += 1

        create, write_shard = ActivationStore.create, ActivationStore.write_shard

        def marked_create(*given):  # type: ignore[no-untyped-def]
            enter("plan")
            store = create(*given)
            enter("fill")
            return store

        def marked_write(*given, **options):  # type: ignore[no-untyped-def]
            enter("commit")
            write_shard(*given, **options)
            enter("fill")

        ActivationStore.create, ActivationStore.write_shard = marked_create, marked_write  # type: ignore[method-assign]
        try:
            return harvest.cli.main(arguments)
        except BaseException:
            import traceback

            traceback.print_exc()
            return 99

    def wait_for(self, phase: str, times: int) -> None:
        """Wait until the phase has begun for the `times`-th time, or the process has ended."""
        while self._phases.count(phase[0]) < times and (letter := os.read(self._reader, 1)):
            self._phases += letter.decode()

    def send(self, what: int) -> None:
        """Send a signal."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, what)

    def end(self) -> Ended:
        """Wait for the end."""
        self.wait_for("?", 1)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._reader)
        self._words.seek(0)
        words = self._words.read().decode(errors="replace")
        self._words.close()
        last = self._phases[-1:]
        return Ended(code, next((p for p in PHASES if p[0] == last), ""), words)


class Bench:
    """The harvest that is disturbed, its reference, and the table."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.rng = np.random.default_rng(seed)
        self.failures: list[str] = []
        self.rows: list[str] = []
        texts = folder / "texts"
        texts.mkdir()
        for i in range(5):
            (texts / f"{i}.txt").write_text("".join(chr(97 + (i * 7 + j * j) % 26) for j in range(95)))
        self._options = ["--model", str(tiny_model("gpt2", folder / "model")), "--dataset", str(texts)]
        self._options += ["--context-length", "20", "--batch-size", "3", "--device", "cpu"]
        torch.set_num_threads(1)
        harvest.settings.chunk_and_shard_tokens = lambda *sizes: (CHUNK, SHARD)
        load, loaded = harvest.run.load_weights, {}

        def load_once(*given, **options):  # type: ignore[no-untyped-def]
            if not loaded:
                loaded[0] = load(*given, **options)
            return loaded[0]

        harvest.run.load_weights = load_once
        if harvest.cli.main(self.arguments(folder / "first.zarr")):  # In this process, so that its forks have it all.
            raise SystemExit("the undisturbed harvest failed")
        before = time.perf_counter()
        self.must_end(self.start(folder / "reference.zarr"), 0, "reference")
        self.seconds = time.perf_counter() - before
        self.reference = files_of(folder / "reference.zarr")
        self.n_shards = ActivationStore.open(folder / "reference.zarr").meta.n_shards

    def arguments(self, out: Path) -> list[str]:
        return [*self._options, "--out", str(out)]

    def start(self, out: Path, action: Action = lambda phase, before: None) -> Child:
        return Child(self.arguments(out), action)

    def check(self, good: bool, what: str) -> None:
        if not good:
            self.failures.append(what)
            print("FAILED:", what, file=sys.stderr)

    def must_end(self, child: Child, code: int, what: str) -> Ended:
        ended = child.end()
        self.check(ended.code == code, f"{what}: exit code {ended.code} instead of {code}: {ended.words[-300:]}")
        self.check("Traceback" not in ended.words, f"{what}: a traceback: {ended.words[-300:]}")
        return ended

    def nothing_half_done(self, out: Path, what: str) -> None:
        """What is there now is no store, or one that lacks shards and has nothing wrong."""
        if (out / "zarr.json").exists():
            wrong = [bad.reason for bad in verify(out) if not bad.reason.startswith("missing")]
            self.check(not wrong, f"{what}: {wrong}")

    def completes(self, out: Path, what: str) -> None:
        """The same command ends well now and leaves the reference's bytes, and nothing beside the store."""
        self.must_end(self.start(out), 0, f"{what}, run again")
        self.check(files_of(out) == self.reference, f"{what}: other bytes than those of an undisturbed run")
        beside = {entry.name for entry in out.parent.iterdir()} - {out.name, f"{out.stem}.harvest.toml"}
        self.check(not beside, f"{what}: left beside the store: {beside}")

    def row(self, fault: str, times: int, ended: Counter[str]) -> None:
        self.rows.append(f"{fault:<34}{times:>6}   " + ", ".join(f"{n} {what}" for what, n in ended.most_common()))
        print(self.rows[-1], flush=True)

    @contextlib.contextmanager
    def place(self) -> Iterator[Path]:
        """Where to make a store, in a folder of its own."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            yield folder / "acts.zarr"
        finally:
            shutil.rmtree(folder)

    def moment(self, child: Child, phase: str, shards: int) -> None:
        """Wait for a random moment of a phase, at one of the first `shards` shards."""
        child.wait_for(phase, 1 if phase == "plan" else int(self.rng.integers(1, shards + 1)))
        longest = self.seconds / (3 if phase == "plan" else 3 * self.n_shards)
        # A commit may take a thousandth of that, where syncs cost nothing: waits of every order of magnitude.
        scale = 10 ** -float(self.rng.uniform(0, 3)) if phase == "commit" else 1.0
        time.sleep(scale * float(self.rng.uniform(0, longest)))

    # The faults

    def kills(self, runs: int) -> None:
        counts, tries = Counter[str](dict.fromkeys(PHASES, 0)), 0
        while min(counts.values()) < runs and tries < 12 * runs:
            aim = min(counts, key=lambda phase: counts[phase])
            tries += 1
            with self.place() as out:
                child = self.start(out)
                self.moment(child, aim, self.n_shards)
                child.send(signal.SIGKILL)
                ended = child.end()
                if ended.code == -signal.SIGKILL and ended.phase:
                    counts[ended.phase] += 1
                    self.nothing_half_done(out, f"kill -9 in {ended.phase}")
                    self.completes(out, f"kill -9 in {ended.phase}")
        for phase in PHASES:
            self.check(counts[phase] >= runs, f"kill -9 in {phase}: hit only {counts[phase]} times")
            self.row(f"kill -9 in {phase}", counts[phase], Counter({"whole and the same after": counts[phase]}))

    def full_disk(self, runs: int) -> None:
        disk = self.folder / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
        if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
            self.rows.append("full disk: left out, because no file system can be mounted here (needs root)")
            print(self.rows[-1])
            return
        shard_bytes = len(self.reference["resid_post/c.0.0.0"])
        try:
            for phase in PHASES:
                seen: Counter[str] = Counter()
                for _ in range(runs):
                    turn = 0 if phase == "plan" else int(self.rng.integers(self.n_shards - 1))
                    room = int(self.rng.integers(shard_bytes * 3 // 2))

                    def fill_up(now: str, before: int, phase: str = phase, turn: int = turn, room: int = room) -> None:
                        if (now, before) == (phase, turn):
                            take_space(disk / "filler", room)

                    out = disk / "stores/acts.zarr"
                    out.parent.mkdir()
                    what = f"full disk in {phase}"
                    ended = self.start(out, fill_up).end()
                    seen[f"exit {ended.code}"] += 1
                    said = "No space left" in ended.words and "Traceback" not in ended.words
                    self.check(
                        (ended.code == 1 and said) or ended.code == 0, f"{what}: {ended.code} {ended.words[-300:]}"
                    )
                    self.nothing_half_done(out, what)
                    (disk / "filler").unlink()
                    self.completes(out, what)
                    shutil.rmtree(out.parent)
                self.row(f"full disk in {phase}", runs, seen)
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    def read_only(self, runs: int) -> None:
        """The folders of shards refuse new files (chattr +i, which binds root too) from a random shard on."""
        seen: Counter[str] = Counter()
        for _ in range(runs):
            turn = int(self.rng.integers(self.n_shards - 1))
            with self.place() as out:
                folder = str(out / str(self.rng.choice(["resid_post", "shard_moments"])))

                def freeze(phase: str, before: int, turn: int = turn, folder: str = folder) -> None:
                    if (phase, before) == ("commit", turn):
                        subprocess.run(["chattr", "+i", folder], check=True)

                ended = self.start(out, freeze).end()
                subprocess.run(["chattr", "-i", folder], check=True)
                seen[f"exit {ended.code}"] += 1
                said = "not permitted" in ended.words and "Traceback" not in ended.words
                self.check(ended.code == 1 and said, f"read-only: {ended.code} {ended.words[-300:]}")
                self.nothing_half_done(out, "read-only")
                self.completes(out, "read-only")
        self.row("store made read-only midway", runs, seen)

    def signals(self, runs: int) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            seen: Counter[str] = Counter()
            while seen["exit 130"] < runs and seen.total() < 3 * runs:
                with self.place() as out:
                    child = self.start(out)
                    self.moment(child, PHASES[seen.total() % 3], 2)
                    child.send(number)
                    ended = child.end()
                    seen[f"exit {ended.code}"] += 1
                    # One that comes in the last moments finds the work done.
                    good = ended.code == 130 or (ended.code == 0 and files_of(out) == self.reference)
                    self.check(good and "Traceback" not in ended.words, f"{number.name}: {ended.code} {ended.words}")
                    self.nothing_half_done(out, number.name)
                    self.completes(out, number.name)
            self.row(number.name, seen.total(), seen)

    def two_at_once(self, runs: int) -> None:
        """The first waits a while at a random place, so that the second meets it."""
        seen: Counter[str] = Counter()
        for i in range(runs):
            at = PHASES[i % 3], 0 if i % 3 == 0 else int(self.rng.integers(3))

            def wait(phase: str, before: int, at: tuple[str, int] = at) -> None:
                if (phase, before) == at:
                    time.sleep(3 * self.seconds)

            with self.place() as out:
                first = self.start(out, wait)
                first.wait_for(at[0], at[1] + 1)
                both = self.start(out).end(), first.end()
                refused = [e for e in both if e.code in (1, 3) and "Traceback" not in e.words]
                done = [e for e in both if e.code == 0]
                self.check(len(done) >= 1 and len(refused) + len(done) == 2, f"two at once: {both}")
                seen["one refused" if refused else "the second came after the first's end"] += 1
                self.check(files_of(out) == self.reference, "two at once: other bytes")
                self.completes(out, "two at once")
        self.row("two harvests of one store", runs, seen)

    def folders(self, runs: int) -> None:
        """Kills, and full disks, of the commands that write a folder."""
        for name, arguments in folder_commands(self.folder, self._options[:4]).items():
            out = self.folder / "out"
            run = functools.partial(folder_command, name.split(",")[0], [*arguments, str(out)])
            run()  # In this process, so that its forks have it all loaded and compiled.
            shutil.rmtree(out)
            before = time.perf_counter()
            calls = died_at(run, 1 << 30, "die")[1]
            seconds = time.perf_counter() - before
            expected = files_of(out)
            for fault, times in (("die", runs), ("full", -(-runs // 5))):
                seen: Counter[str] = Counter()
                for i in range(times):
                    shutil.rmtree(out, ignore_errors=True)
                    if "--overwrite" in arguments:
                        shutil.copytree(self.folder / "old", out)
                    at = int(self.rng.integers(1, calls + 1))
                    if fault == "die" and i % 2:
                        what = f"{name}, killed at a random moment"
                        code = killed_after(run, float(self.rng.uniform(0, seconds)))
                    else:
                        what = f"{name}, {fault} at call {at} of {calls}"
                        code = died_at(run, at, fault)[0]
                    whole = files_of(out) == expected if out.exists() else False
                    self.check(code in (0, 1, -9), f"{what}: exit code {code}")
                    again = died_at(run, 1 << 30, "die")[0]
                    seen["whole before" if whole else "finished by the next"] += 1
                    self.check(again == 0 or (again == 2 and whole), f"{what}: run again, exit code {again}")
                    self.check(files_of(out) == expected, f"{what}: other bytes than those of an undisturbed run")
                    left = [path.name for path in out.parent.glob(f"{out.name}*") if path != out]
                    self.check(not left, f"{what}: left beside: {left}")
                self.row(f"{name}: {'kill -9' if fault == 'die' else 'full disk'}", times, seen)

    def bad_bytes(self, faults: int) -> None:
        with self.place() as out:
            shutil.copytree(self.folder / "reference.zarr", out)
            expected = everything(out)
            files = sorted(p for p in out.rglob("*") if p.is_file() and p.stat().st_size)
            seen: dict[str, Counter[str]] = {}
            for i in range(faults):
                file = files[i % len(files)]
                data = file.read_bytes()
                broken, what = random_fault(data, self.rng)
                file.write_bytes(broken)
                try:
                    outcome = "harmless" if harmless(out, expected) else "SILENTLY READ"
                except (ResidscopeError, OSError):
                    outcome = "detected"
                    self.check(bool(verify(out)), f"{file.relative_to(out)}, {what}: verify finds nothing")
                file.write_bytes(data)
                name = "metadata (zarr.json)" if file.name == "zarr.json" else file.parent.name
                seen.setdefault(name, Counter())[outcome] += 1
                self.check(outcome != "SILENTLY READ", f"{file.relative_to(out)}, {what}: silently read")
            for name, outcomes in sorted(seen.items()):
                self.row(f"bad bytes: {name}", outcomes.total(), outcomes)
            self.row("bad bytes: all", faults, sum(seen.values(), Counter()))


def folder_commands(folder: Path, text: list[str]) -> dict[str, list[str]]:
    """Command lines by what they do, the output's path left out; and what they need."""
    from tests.support.small import make_small

    (folder / "small").mkdir()
    small = make_small(folder / "small", n_tokens=120)
    two = [str(small.sae), str(small.sae.with_name("other.pt"))]
    shutil.copyfile(*two)
    analyses = [f"{sae}.analysis" for sae in two]
    analyze = ["--store", str(small.store), "--no-nulls", "--downstream-tokens", "0", "--sae"]
    for sae, out in zip(two, analyses, strict=True):
        folder_command("analyze", [*analyze, sae, "--out", out])
    folder_command("convert", [two[0], "--to", "saelens", str(folder / "old")])
    compare = ["--store", str(small.store), "--sae", *two, "--no-pca", "--device", "cpu", "--out"]
    lens = [*text, "--context-length", "20", "--kl-steps", "2", "--kl-batch", "8", "--eval-tokens", "30", "--out"]
    return {
        "convert, to residscope": [two[0], "--to", "residscope"],
        "convert, to hookpoints": [two[0], "--to", "sparsify", "--hookpoints", "a", "b", "--"],
        "convert, over another": [two[0], "--to", "saelens", "--overwrite"],
        "train compare": compare,
        "analyze --compare": ["--compare", *analyses, "--out"],
        "fit-lens": lens,
        "analyze": [*analyze, two[0], "--out"],
    }


def folder_command(name: str, arguments: list[str]) -> int:
    """Run one of them; the exit code. Its clock stands still, because some of what they write is how long they took."""
    import dask.threaded

    import analysis.cli
    import analysis.run
    import harvest.lens.cli
    import harvest.lens.fit
    import train.compare.cli
    import train.formats.cli

    dask.threaded.default_pool, _ = None, dask.threaded.pools.clear()  # its threads are missing in a fork
    still = types.SimpleNamespace(monotonic=lambda: 0.0, perf_counter=lambda: 0.0)
    analysis.run.time = harvest.lens.fit.time = still  # type: ignore[assignment]
    mains = {
        "convert": train.formats.cli,
        "train compare": train.compare.cli,
        "fit-lens": harvest.lens.cli,
        "analyze": analysis.cli,
        "analyze --compare": analysis.cli,
    }
    with Path(os.devnull).open("w") as no, contextlib.redirect_stdout(no), contextlib.redirect_stderr(no):
        return mains[name].main(arguments)


def died_at(run: Callable[[], int], calls: int, how: str) -> tuple[int, int]:
    """Run in a process that is killed ("die") or meets a full disk ("full") at that of its calls that change the disk;
    its exit code, -9 when killed, and how many calls there were."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:

        def act(by_half: Callable) -> None:
            by_half()
            if how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        write = os.write  # Below, where it is not one of the calls that fail.
        left = count_down(calls, act, lambda name, call: setattr(os, name, call))
        try:
            code = run()
        except BaseException:
            code = 99
        write(writer, str(calls - left[0]).encode())
        os._exit(code)
    os.close(writer)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    made = os.read(reader, 20)
    os.close(reader)
    return code, int(made or 0)


def killed_after(run: Callable[[], int], seconds: float) -> int:
    """Run in a process that is killed after so long; its exit code."""
    child = os.fork()
    if child == 0:
        os._exit(run())
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def take_space(filler: Path, leave: int) -> None:
    """Fill the file system of `filler` but for `leave` bytes."""
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
        file.truncate(max(file.tell() - leave, 0))


def main() -> int:
    parser = argparse.ArgumentParser(description="Do faults to a harvest, and look for losses.")
    parser.add_argument("--runs", type=int, default=25, help="times that each fault is done")
    parser.add_argument("--flips", type=int, default=1000, help="bits that are flipped and ends that are cut off")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments and places")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=FAULTS, help="which faults (default: all)")
    options = parser.parse_args()
    began = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="bench-faults-"))
    try:
        bench = Bench(folder, options.seed)
        print(
            f"{'fault':<34}{'times':>6}   how it ended; each time whole and the same bytes after the next run",
            flush=True,
        )
        for fault in options.only:
            getattr(bench, fault)(options.flips if fault == "bad_bytes" else options.runs)
    finally:
        shutil.rmtree(folder)
    print(f"{len(bench.failures)} failures; {time.perf_counter() - began:.0f} s")
    return 1 if bench.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
