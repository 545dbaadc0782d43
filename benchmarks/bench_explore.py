"""`residscope explore` in a browser: how soon its page shows, how long a sentence takes, and how much memory.

    python benchmarks/bench_explore.py --store acts.zarr --sae ckpt.pt [--out ANALYSIS] [--images FOLDER] [--json]

Starts the command, opens its page in headless Chromium with an empty profile, waits for the model, and types ten
sentences that it has not seen, one after the other, then all in a row; asks for a latent's card, a search, and an
ablation at all layers with sixteen tokens after it. Times are those of the page: from typing to the picture. Memory is
that of the server's process. Exit code 0 if the page shows within a second, each sentence within two, and nothing is
said on the console. Not measured: other browsers; texts of more than a line.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.support.browser import SCRIPT
from tests.support.chromium import Page, find_chromium

MAX_VIEW, MAX_SENTENCE = 1.0, 2.0
SENTENCES = (
    *("def area(width, height): return width * height", "for line in open(path): print(line.strip())"),
    *("The event loop runs asynchronous tasks and callbacks.", "If the file does not exist, an error is raised."),
    *("import os, sys; sys.exit(0)", "class Point: x = 0; y = 0", "Return True if the object is callable."),
    *("with socket.socket() as server: server.listen()", "A tuple of three numbers: year, month and day.\n"),
    "The method returns a new string in lower case.",
)
PICTURES = {
    "explore.png": "#text=def+area(width,+height):+return+width&latent={latent}&layer={layer}",
    "explore-switches.png": "#text=def+area(width,+height):+return+width&token=8&sort=specificity&shown=12",
}


def main() -> int:
    """Measure; 0 if all is as it should be."""
    parser = argparse.ArgumentParser(description="residscope explore in headless Chromium.")
    parser.add_argument("--store", required=True)
    parser.add_argument("--sae", required=True)
    parser.add_argument("--out", help="folder of the analysis")
    parser.add_argument("--images", type=Path, help="folder for the pictures of docs/explore.md")
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    options = parser.parse_args()
    binary = find_chromium()
    if binary is None:
        print("bench_explore: no chromium or google-chrome on PATH (Debian: apt install chromium)", file=sys.stderr)
        return 1
    command = [sys.executable, "-m", "residscope", "explore", "--store", options.store, "--sae", options.sae]
    command += ["--no-browser", *(["--out", options.out] if options.out else [])]
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            address = _address(log, server)
            started = time.perf_counter() - began
            with Page(binary, 1200, 900) as page:
                found = {"started_s": started, **measure(page, address, server.pid)}
                if options.images:
                    take_pictures(page, address, options.images)
                found["console"] = page.console
        finally:
            server.terminate()
            server.wait()
    slowest = max(found["sentences_s"])
    good = found["first_view_s"] < MAX_VIEW and slowest < MAX_SENTENCE and not found["console"]
    for name, value in found.items():
        numbers = value if isinstance(value, list) and name.endswith("_s") else None
        words = f"median {statistics.median(numbers):.2f}, slowest {max(numbers):.2f}" if numbers else value
        print(f"{name:24} {words:.2f}" if isinstance(words, float) else f"{name:24} {words}")
    print("all as it should be" if good else "NOT as it should be")
    if options.json:
        print(json.dumps({"good": good, **found}))
    return 0 if good else 1


def measure(page: Page, address: str, pid: int) -> dict[str, Any]:
    """Times in seconds and memory in GB, by name."""
    page.open(address)
    view = "const paint = await until(() => performance.getEntriesByName('first-contentful-paint')[0]);"
    view += "await until(() => text('#about').includes('layers')); return performance.now() / 1000;"
    found: dict[str, Any] = {"first_view_s": page.run(SCRIPT % view), "memory_at_first_gb": _memory(pid)}
    began = time.perf_counter()
    for _ in range(10):  # each call waits for half a minute
        try:
            page.run(SCRIPT % "await until(() => text('#model') === '');")
            break
        except RuntimeError:
            continue
    found["model_ready_s"] = time.perf_counter() - began
    found["first_sentence_s"] = page.run(SCRIPT % (TYPE % json.dumps("The first sentence of all.")))
    found["sentences_s"] = [page.run(SCRIPT % (TYPE % json.dumps(text))) for text in SENTENCES]
    found["ten_in_a_row_s"] = page.run(SCRIPT % (ROW % json.dumps([text + " " for text in SENTENCES])))
    found["change_s"] = page.run(SCRIPT % CHANGE)
    found["card_s"] = [page.run(SCRIPT % CARD) for _ in range(3)]
    found["search_s"] = page.run(SCRIPT % SEARCH)
    found["memory_gb"] = _memory(pid)
    return found


TYPE = """const began = performance.now(), status = find('#sentence-status'), before = find('#maps').firstChild;
change('#text', %s, 'input');
await until(() => / s\\.$/.test(status.textContent) && find('#maps').firstChild !== before);
await new Promise((next) => requestAnimationFrame(() => requestAnimationFrame(next)));
return (performance.now() - began) / 1000;"""

ROW = """const began = performance.now(), texts = %s, status = find('#sentence-status');
for (const words of texts) { change('#text', words, 'input'); await new Promise((next) => setTimeout(next, 30)); }
await until(() => / s\\.$/.test(status.textContent));
const shown = all('#tokens button').slice(1).map((at) => at.textContent).join('').replaceAll('\\u23ce', '\\n');
if (!shown.startsWith(texts.at(-1).trim().slice(0, 10))) throw new Error(`shown is ${shown}`);
return (performance.now() - began) / 1000;"""

CHANGE = """find('#add').click(); const began = performance.now(); find('#run').click();
await until(() => / s\\.$/.test(text('#change-status'))); return (performance.now() - began) / 1000;"""

CARD = """const maps = all('.heat'), map = maps[Math.floor(Math.random() * maps.length)], began = performance.now();
key(map, 'ArrowUp'); key(map, 'Enter'); await until(() => find('#card .bars')); const took = performance.now() - began;
(await until(() => named('Close the card'))).click(); return took / 1000;"""

SEARCH = """find('#to-search').click(); find('#search-tokens').value = 'return'; const began = performance.now();
find('#search-form button').click(); await until(() => / s\\.$/.test(text('#search-status')));
return (performance.now() - began) / 1000;"""


def take_pictures(page: Page, address: str, folder: Path) -> None:
    """The pictures of docs/explore.md."""
    page.open(address + PICTURES["explore.png"].split("&latent")[0])
    strongest = "const map = await until(() => all('.heat')[2]); key(map, 'Enter'); return location.hash;"
    place = re.findall(r"(latent|layer)=(\d+)", page.run(SCRIPT % strongest))
    for name, state in PICTURES.items():
        page.open("about:blank")
        page.open(address + state.format(**dict(place)))
        card = "(find('#card').hidden || find('#card .bars'))"
        page.run(SCRIPT % f"await until(() => {card} && find('.heat') && text('#model') === '');")
        page.screenshot(folder / name)


def _address(log: Any, server: subprocess.Popen[bytes]) -> str:
    while True:
        log.seek(0)
        if found := re.search(r"http://\S+", log.read()):
            return found[0]
        if server.poll() is not None:
            log.seek(0)
            raise SystemExit(f"bench_explore: the server did not start: {log.read()}")
        time.sleep(0.01)


def _memory(pid: int) -> float:
    """Resident memory of a process, GB."""
    (kilobytes,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    return int(kilobytes) / 1e6


if __name__ == "__main__":
    raise SystemExit(main())
