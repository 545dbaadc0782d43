"""Tables as parquet files whose pages have checksums, so that a damaged page is refused."""

from functools import partial
from typing import Any

import pyarrow.parquet as pq

CHECKED: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
"""Options with which every table is written."""

write_table = partial(pq.write_table, **CHECKED)
read_file = partial(pq.ParquetFile, page_checksum_verification=True)
read_table = partial(pq.read_table, page_checksum_verification=True)
