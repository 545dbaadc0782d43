"""Tables of an analysis: a damaged one gives no other numbers."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from analysis.results.tables import read_table, write_table


def test_a_flipped_bit_changes_no_number(tmp_path: Path) -> None:
    rng, path, refused = np.random.default_rng(0), tmp_path / "a.parquet", 0
    lists = pa.FixedSizeListArray.from_arrays(pa.array(rng.random(4000)), 4)
    table = pa.table({"latent": np.arange(1000), "mean": rng.normal(size=1000), "probs": lists})
    write_table(table, path)
    assert read_table(path).equals(table)
    whole = path.read_bytes()
    pages = len(whole) - int.from_bytes(whole[-8:-4], "little") - 8  # behind them types and places
    for bit in rng.integers(0, 8 * pages, 300).tolist():
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert read_table(path).equals(table), bit
        except OSError:
            refused += 1
    assert refused > 250
