"""report.html of a very large dictionary: made up, of random words, so that it compresses worse than text.

    python benchmarks/bench_large_report.py [--latents 131072] [--layers 30] [--out FOLDER]

Writes an analysis without a model and makes its report; prints its size, what it left out, time and memory. Exit code 0
if it is below 15 MB. `bench_report.py FOLDER/report.html` then opens it in a browser.
"""

import argparse
import re
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent.parent))

from analysis.latents.examples import COLUMNS
from analysis.report.page import write_report
from tests.support.results import write_results

MAX_BYTES = 15_000_000
PER_LATENT, WINDOW = 8, 25


def main() -> int:
    """Make it and measure."""
    parser = argparse.ArgumentParser(description="The size of report.html with a very large dictionary.")
    parser.add_argument("--latents", type=int, default=131_072)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--out", type=Path, help="folder that is kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        made_up(out, options.latents, options.layers)
        began = time.perf_counter()
        report = write_report(out)
        seconds, size = time.perf_counter() - began, report.stat().st_size
        note = re.findall(r'id="latent-note"[^>]*>([^<]*)<', report.read_text(encoding="utf-8"))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{options.latents:,} latents, {options.layers} layers: {size / 1e6:.2f} MB (at most {MAX_BYTES / 1e6:g})")
    print(f"made in {seconds:.1f} s with {memory:.2f} GB at most; {note}")
    return 0 if size < MAX_BYTES else 1


def made_up(out: Path, n_latents: int, n_layers: int) -> None:
    """An analysis: eight contexts of each live latent, three words, five neighbours."""
    write_results(out, n_layers=n_layers, n_latents=n_latents, dead_fraction=0.05)
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = np.array(["".join(rng.choice(letters, rng.integers(2, 8))) for _ in range(30_000)], object)

    def words(n: int) -> np.ndarray:
        return vocabulary[(len(vocabulary) * rng.random(n) ** 3).astype(int)]

    table = pq.read_table(out / "latents.parquet")
    near, cosines = rng.integers(0, n_latents, (n_latents, 5)), rng.random((n_latents, 5))
    columns = {"fires_on": words(3 * n_latents).reshape(-1, 3), "neighbours": near, "neighbour_cosines": cosines}
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values.tolist()))
    pq.write_table(table, out / "latents.parquet")
    live = np.flatnonzero(table["count"].to_numpy() > 0)
    with pq.ParquetWriter(out / "examples.parquet", COLUMNS) as writer:
        for part in np.array_split(live, max(1, len(live) // 8192)):
            n = len(part) * PER_LATENT
            texts = [f" {word}" for word in words(n * WINDOW)]
            offsets = pa.array(np.arange(0, n * WINDOW + 1, WINDOW, dtype=np.int32))
            activations = rng.random(n * WINDOW).astype(np.float32) * (rng.random(n * WINDOW) < 0.15)
            found = {
                "latent": np.repeat(part, PER_LATENT),
                "layer": np.tile(np.arange(PER_LATENT), len(part)),
                "activation": 1 + rng.random(n).astype(np.float32),
                "token": rng.integers(0, 10**6, n),
                "text_token": texts[WINDOW // 2 :: WINDOW],
                "marked": np.full(n, WINDOW // 2),
                "texts": pa.ListArray.from_arrays(offsets, pa.array(texts)),
                "activations": pa.ListArray.from_arrays(offsets, pa.array(activations)),
            }
            empty = {name: [""] * n for name in ("text_before", "text_after")}
            rest = {name: np.zeros(n, np.int64) for name in ("rank", "document")}
            given = found | empty | rest
            writer.write_table(pa.table([given[name] for name in COLUMNS.names], schema=COLUMNS))


if __name__ == "__main__":
    raise SystemExit(main())
