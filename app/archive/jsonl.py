"""JSON lines, plain or with gzip: PostgreSQL makes the lines, Python only carries them."""

import gzip
from pathlib import Path
from typing import BinaryIO, cast

#: Quick: a second core is PostgreSQL's.
_LEVEL = 3


class JsonLinesFile:
    """Writes lines out of COPY's text format, whole rows at a time."""

    def __init__(self, path: Path, *, compressed: bool) -> None:
        self._file = (
            # Nothing of the moment in it: the same rows are the same bytes.
            cast("BinaryIO", gzip.GzipFile(path, "wb", compresslevel=_LEVEL, mtime=0))
            if compressed
            else path.open("wb")
        )

    def write(self, rows: bytes) -> int:
        # Of the characters that COPY escapes, JSON text can hold none raw but the backslash.
        self._file.write(rows.replace(b"\\\\", b"\\"))
        return rows.count(b"\n")

    def close(self) -> None:
        self._file.close()
