"""Flip each single bit of small files that are loaded and computed with, and look for silently other results.

    python benchmarks/bench_bits.py [--every N] [--only WORD ...]

How: ckpt.pt, ckpt.safetensors, both files of each foreign format (with our record in it, which has a check sum, and
without, as other tools write them: of those only the configuration, as nothing protects their weights), a lens, and
summary.json. Each is loaded once for each bit: it is refused in one line, or what is computed from it is the same, or
the user is told. In a foreign configuration without a check sum one digit for another cannot be told from what was
meant, and is counted as such. Exit code 1 for a silent change, or anything raised but our own errors.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from analysis.compare import measure
from analysis.config import CompareConfig
from residscope.errors import IncompatibleError, UsageError
from tests.support import bits
from tests.support.results import write_results


def summary_place(folder: Path) -> bits.Place:
    """summary.json, as `analyze --compare` reads it; without its figure, which takes a second."""
    from analysis.results.summary import HASH, content_hash

    write_results(folder, n_latents=6, n_layers=2, ci=False)
    file = folder / "summary.json"
    summary = json.loads(file.read_text())
    file.write_text(json.dumps({**summary, HASH: content_hash(summary)}))
    measure.write_comparison = lambda runs, out: []  # type: ignore[assignment]

    def load() -> bits.Loaded:
        paths = CompareConfig(compare=(folder,), out=folder / "out", json=True)
        return bits.Loaded([measure._checked_run(folder, "a", measure._load(paths.compare[0]))])

    return bits.Place("summary.json", file, load)


def flip_all(place: bits.Place, every: int) -> Counter[str]:
    """Outcomes by their names."""
    data, counts = place.file.read_bytes(), Counter[str]()
    reference = place.load()
    for bit in range(0, 8 * len(data), every):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        place.file.write_bytes(changed)
        try:
            found = place.load()
        except (IncompatibleError, UsageError) as error:
            counts["refused" if "\n" not in str(error) else "REFUSED IN SEVERAL LINES"] += 1
            continue
        if bits.same(reference, found):
            counts["the same" if found.said == reference.said else "the same, with a note"] += 1
        elif found.said != reference.said:
            counts["another, with a note"] += 1
        elif "without our record" in place.name and bits.harmless(data[bit // 8]):
            counts["another digit"] += 1
        else:
            counts["SILENT"] += 1
            print(f"SILENT: {place.name} bit {bit}: {data[max(bit // 8 - 20, 0) : bit // 8 + 10]!r}", file=sys.stderr)
    place.file.write_bytes(data)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description="Flip each bit of small files, and look for silent changes.")
    parser.add_argument("--every", type=int, default=1, help="only each N-th bit")
    parser.add_argument("--only", nargs="+", default=[""], help="only files whose name has one of these words")
    options = parser.parse_args()
    torch.set_num_threads(1)
    total, began = Counter[str](), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "analysis").mkdir()
        for place in (*bits.places(Path(folder)), summary_place(Path(folder) / "analysis")):
            if any(word in place.name for word in options.only):
                counts = flip_all(place, options.every)
                total += counts
                shown = ", ".join(f"{n} {what}" for what, n in counts.most_common())
                print(f"{place.name:<44}{place.file.stat().st_size:>6} bytes   {shown}", flush=True)
    print(f"{sum(total.values())} flips, {total['SILENT']} silent; {time.perf_counter() - began:.0f} s")
    return 1 if any(what.isupper() for what in total) else 0


if __name__ == "__main__":
    raise SystemExit(main())
