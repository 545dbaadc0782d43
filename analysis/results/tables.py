"""Tables as parquet files whose pages have check sums: a damaged page is refused, and gives no other numbers."""

from functools import partial
from typing import Any

import pyarrow.parquet as pq

CHECKED: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
"""How every table is written."""

write_table = partial(pq.write_table, **CHECKED)
read_file = partial(pq.ParquetFile, page_checksum_verification=True)
read_table = partial(pq.read_table, page_checksum_verification=True)
