"""Parquet with zstd. Needs the extra `export`: nothing is imported before it is asked for."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Any

from app.archive.manifest import Table
from app.errors import ArchiveRefused

#: Rows that are turned into Python's objects at once.
_ROWS_AT_ONCE = 1000


def _pyarrow() -> Any:
    # The one that gives all of it back when asked. Only the environment sets what the writer takes, too.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    try:
        import pyarrow as pa  # noqa: PLC0415 - an extra, and 50 MB
        import pyarrow.csv  # noqa: PLC0415 - see above
        import pyarrow.parquet  # noqa: PLC0415 - see above
    except ImportError as exc:
        raise ArchiveRefused(
            "Parquet needs pyarrow, which is not installed",
            # This interpreter's: the pip of the path may be another's, and an index another package of the name.
            hint=f"`{quote(sys.executable)} -m pip install 'chat-sessions[export]'`, or `--format jsonl`, which needs nothing",
        ) from exc
    return pa


def require() -> None:
    """Raises `ArchiveRefused` that says what to install."""
    _pyarrow()


def _schema(pa: Any, table: Table) -> Any:
    time, text, whole = pa.timestamp("ms", tz="UTC"), pa.string(), pa.int32()
    columns: dict[Table, dict[str, Any]] = {
        "sessions": {
            "session_id": text,
            "user_id": text,
            "created_at": time,
            "last_activity": time,
            "message_count": whole,
            "metadata": text,
        },
        "messages": {
            "session_id": text,
            "seq": whole,
            "message_id": text,
            "role": text,
            "content": text,
            "created_at": time,
            "processing_time_ms": whole,
            "source_count": pa.int16(),
            "metadata": text,
            "request_digest": text,
            "request_size": pa.int16(),
        },
    }
    return pa.schema(list(columns[table].items()))


class ParquetFile:
    """Writes a table out of CSV as PostgreSQL copies it, whole rows at a time: a row group each."""

    def __init__(self, path: Path, table: Table) -> None:
        self._pa = pa = _pyarrow()
        self._schema = _schema(pa, table)
        # PostgreSQL quotes an empty text, and leaves a NULL without quotes.
        self._convert = pa.csv.ConvertOptions(
            # Times are copied as milliseconds: nothing has to be parsed.
            column_types={one.name: pa.int64() if one.name in _TIMES else one.type for one in self._schema},
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        )
        self._parse = pa.csv.ParseOptions(newlines_in_values=True)
        self._writer = pa.parquet.ParquetWriter(
            path, self._schema, compression="zstd", compression_level=1, use_dictionary=["session_id", "role"]
        )

    def write(self, rows: bytes) -> int:
        pa = self._pa
        # One block: a row of any size fits.
        read = pa.csv.ReadOptions(
            column_names=self._schema.names, block_size=len(rows) + 1, use_threads=False
        )
        table = pa.csv.read_csv(
            pa.BufferReader(rows), read_options=read, parse_options=self._parse, convert_options=self._convert
        )
        self._writer.write_table(table.cast(self._schema))
        count = int(table.num_rows)
        del table
        # Else the allocator keeps it in pieces that the next row group does not fit: 100 MiB more at ten million rows.
        self._pa.default_memory_pool().release_unused()
        return count

    def close(self) -> None:
        self._writer.close()


_TIMES = {"created_at", "last_activity"}


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, as our JSON lines would have them."""
    pa = _pyarrow()
    try:
        with pa.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, use_threads=False):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as exc:
        raise ArchiveRefused(f"the file can't be read as Parquet from here on: {exc}") from exc
