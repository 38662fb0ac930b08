"""Tables as files; `nlpinf.files` makes them appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nlpinf.files import PARTIAL, disk, first_name, publish, tidy

__all__ = ["PARTIAL", "disk", "first_name", "publish", "tidy", "write_table"]


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file; texts and scores rarely repeat, so that dictionaries of them would only cost time."""
    pq.write_table(
        table,
        path,
        compression="zstd",
        use_dictionary=[name for name in ("tokens", "count") if name in table.column_names],
    )
