"""report.html in a browser, from disk: how soon it shows, that it asks for nothing, and that latents can be looked at.

    python benchmarks/bench_report.py REPORT.html|ANALYSIS_FOLDER [--search import] [--json] [--screenshots FOLDER]

Opens the page in headless Chromium with an empty profile; of a folder, a report is made first, in a temporary copy.
On a desktop's width and a phone's: time to the first view, time until the latents can be searched, a search by text,
an opened latent with its examples by layer, neighbours, histogram and filters; console errors and requests of any kind.
Exit code 0 if the page shows within 2 s, is smaller than 15 MB, works, and is silent. Not measured: other browsers.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.support.chromium import Page, find_chromium

SIZES = {"desktop": (1200, 900), "phone": (390, 844)}
MAX_BYTES = 15_000_000
MAX_SECONDS = 2.0

WAIT = """const until = async (test) => { const began = performance.now(); for (;;) { const found = test(); if (found)
return found; if (performance.now() - began > 30000) throw new Error(`waited in vain for ${test}`);
await new Promise((next) => setTimeout(next, 10)); } };
const find = (choice) => document.querySelector(choice), all = (choice) => [...document.querySelectorAll(choice)];"""

VIEWS = {
    "first_view_s": "(await until(() => performance.getEntriesByName('first-contentful-paint')[0])).startTime / 1000",
    "table_ready_s": "await until(() => !find('#latent-table').hidden && performance.now() / 1000)",
    "fits_width": "document.documentElement.scrollWidth <= innerWidth",
}
"""Numbers right after the page is opened, each a script."""


def main() -> int:
    """Measure at each size; 0 if all is as it should be."""
    parser = argparse.ArgumentParser(description="report.html in headless Chromium, from disk.")
    parser.add_argument("report", type=Path, help="report.html, or the folder of an analysis")
    parser.add_argument("--search", default="import", help="text to search the latents for")
    parser.add_argument("--screenshots", type=Path, help="folder for screenshots of the top and of an opened latent")
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    options = parser.parse_args()
    binary = find_chromium()
    if binary is None:
        return _fail("no chromium or google-chrome on PATH: install one (Debian: apt install chromium)")
    try:
        import tornado  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        return _fail("the package tornado is missing: it comes with dask[distributed] (pip install tornado)")
    with tempfile.TemporaryDirectory() as folder:
        if options.report.is_dir():
            report = _made(options.report, Path(folder) / "analysis")
        elif options.report.is_file():
            report = options.report.resolve()
        else:
            return _fail(f"{options.report} is neither a report nor the folder of an analysis")
        if options.screenshots:
            options.screenshots.mkdir(parents=True, exist_ok=True)
        found = {name: measure(binary, report, name, options.search, options.screenshots) for name in SIZES}
        size = report.stat().st_size
    rows: dict[str, list[Any]] = {}
    for result in found.values():
        for name, value in result.items():
            rows.setdefault(name, []).append(value)
    print(f"{options.report.name}: {size / 1e6:.2f} MB (at most {MAX_BYTES / 1e6:g})")
    print(f"{'':28}" + "".join(f"{name:>24}" for name in found))
    for name, values in rows.items():
        print(f"{name:28}" + "".join(f"{_cell(value):>24}" for value in values))
    good = size < MAX_BYTES and all(_good(result) for result in found.values())
    print("all as it should be" if good else "NOT as it should be")
    if options.json:
        print(json.dumps({"bytes": size, "good": good, **found}))
    return 0 if good else 1


def measure(binary: str, report: Path, name: str, search: str, shots: Path | None) -> dict[str, Any]:
    """Open the report once and use it."""
    address = report.as_uri()
    with Page(binary, *SIZES[name]) as page:
        page.open(address)
        found: dict[str, Any] = {view: page.run(_script(f"return {script}")) for view, script in VIEWS.items()}
        if shots:
            page.screenshot(shots / f"{name}-top.png")
        began = time.perf_counter()
        status = page.run(_script(SEARCH % json.dumps(search)))
        found |= {"search_s": time.perf_counter() - began, "found": status}
        began = time.perf_counter()
        opened = page.run(_script(OPEN))
        found |= {"open_s": time.perf_counter() - began, **opened}
        if shots:
            page.screenshot(shots / f"{name}-latent.png")
        found |= page.run(_script(USE))
        found["fits_width"] = found["fits_width"] and page.run(VIEWS["fits_width"])
        found["console"] = page.console
        found["requests"] = [at for at in page.requests if at != address and not at.startswith(("data:", "blob:"))]
    return found


SEARCH = """const input = find('#latent-search'), status = find('#latent-status'), before = status.textContent;
input.value = %s; input.dispatchEvent(new Event('input', { bubbles: true }));
await until(() => status.textContent !== before && / of /.test(status.textContent)); return status.textContent;"""

OPEN = """find('#latent-table .open').click(); await until(() => find('.examples tbody tr'));
document.documentElement.style.scrollBehavior = 'auto'; find('.detail').scrollIntoView();
return { contexts: all('.examples tbody tr').length };"""

USE = """const shown = (choice) => all(choice).filter((part) => part.offsetParent).length, state = {};
state.coloured_tokens = all('.examples i, .examples mark').length;
const rows = shown('.examples tbody tr'); find('.more')?.click(); await new Promise((next) => setTimeout(next, 300));
state.further_contexts = shown('.examples tbody tr') - rows;
state.histogram_cells = all(".map-place canvas").length;
const plot = find(".map-place canvas");
plot?.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowUp', bubbles: true, cancelable: true }));
state.histogram_reads = find(".map-place .readout")?.textContent ?? '';
const near = all('.near a'); state.neighbours = near.length;
if (near.length) { const wanted = near[0].textContent; near[0].click();
  await until(() => find('.detail .head b')?.textContent === `Latent ${wanted}` && find('.examples tbody tr')); }
scrollTo(0, find('.detail').getBoundingClientRect().top + scrollY + 300);
await new Promise((next) => requestAnimationFrame(() => requestAnimationFrame(next)));
state.header_stays = Math.abs(find('.detail .head').getBoundingClientRect().top) < 2;
find('#latent-reset').click(); const status = find('#latent-status'), kind = find('#latent-kind');
const change = async (input, value) => { const before = status.textContent; input.value = value;
  input.dispatchEvent(new Event('input', { bubbles: true })); await until(() => status.textContent !== before); };
if (kind.options.length > 1) { await change(kind, 'late'); state.late = status.textContent;
  await change(find('#latent-to'), '3'); state.late_up_to_layer_3 = status.textContent; }
find('#latent-reset').click();
const sort = find('#latent-sort'); sort.value = 'layer_mean';
sort.dispatchEvent(new Event('change', { bubbles: true }));
await until(() => find('#latent-table thead [aria-sort=descending] [data-key=layer_mean]'));
state.sorts = sort.options.length; return state;"""
"""Every view of an opened latent and every filter, used once."""


def _script(body: str) -> str:
    return f"(async () => {{ {WAIT} {body} }})()"


def _made(folder: Path, copy: Path) -> Path:
    """A report from an analysis, which stays as it is."""
    from analysis.report.page import write_report

    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("report.html", "*.png", "*.svg", ".partial"))
    return write_report(copy)


def _good(found: dict[str, Any]) -> bool:
    silent = not found["console"] and not found["requests"]
    fits = found["fits_width"] and found["header_stays"]
    return silent and fits and found["first_view_s"] < MAX_SECONDS and found["contexts"] > 0


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return "none" if not value else "; ".join(map(str, value))[:200]
    value = value.split(" live")[0].split(":")[-1].strip() if isinstance(value, str) else value
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _fail(reason: str) -> int:
    print(f"bench_report: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
