"""Out of PostgreSQL into files, a month at a time, in constant memory.

A month is one read-only REPEATABLE READ transaction: its sessions and its messages agree, whoever writes meanwhile.
Its files get their names when they are whole, and are named in the manifest when both are: what is killed at
any line goes on with the month that it was at.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

from app.archive import parquet
from app.archive.jsonl import JsonLinesFile
from app.archive.manifest import (
    NAME,
    File,
    Format,
    Manifest,
    Month,
    Selection,
    Table,
    month_name,
    path_of,
    read_manifest,
    settle,
    sha256_of,
)
from app.chat import LEGACY_MONTH, format_time
from app.errors import ArchiveRefused
from app.postgres.engine import Database
from app.postgres.partitions import next_month
from app.postgres.schema import REVISION, require_revision

#: What is gathered before it is written: a row group of a Parquet file.
_CHUNK_BYTES = 2 * 2**20

#: Of one COPY. It is the operator who has patience, or Ctrl-C.
_SECONDS_MAX = 24 * 3600.0

_EPOCH = datetime.fromisoformat("1970-01-01T00:00:00+00:00")

_COPIED: Mapping[Table, str] = {
    "sessions": "s.session_id, s.user_id, {created_at}, {last_activity}, s.message_count, {metadata}",
    "messages": "m.session_id, m.seq, m.message_id, m.role, m.content, {created_at}, m.processing_time_ms, "
    "m.source_count, {metadata}, encode(m.request_digest, 'hex') AS request_digest, m.request_size",
}


class _Sink(Protocol):
    """A file being made out of what one COPY sends. Blocking."""

    def write(self, rows: bytes) -> int: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What an export came to. `kept`: months that an earlier run had finished, and that are as it left them."""

    sessions: int
    messages: int
    kept: int
    months: int


@dataclass(frozen=True, slots=True)
class _Where:
    """Conditions on `chat.chat_sessions s`, and their arguments."""

    conditions: tuple[str, ...] = ()
    arguments: tuple[object, ...] = ()

    @classmethod
    def of(cls, selection: Selection) -> "_Where":
        return (
            cls()
            .also("s.user_id = ${}::text", selection.user_id)
            .also("s.session_id = ANY (${}::uuid[])", list(selection.session_ids) or None)
            .also("s.created_at >= ${}::timestamptz", selection.since)
            .also("s.created_at < ${}::timestamptz", selection.until)
        )

    def also(self, condition: str, argument: object) -> "_Where":
        if argument is None:
            return self
        number = len(self.arguments) + 1
        return _Where((*self.conditions, condition.format(number)), (*self.arguments, argument))

    def within(self, month: date) -> "_Where":
        """Of one month: its ids stand together in the primary key, and not all between them are of it."""
        where = self.also("chat.session_month(s.session_id) = ${}::date", month)
        if month == LEGACY_MONTH:
            return where
        return where.also("s.session_id >= ${}::uuid", _first_id(month)).also(
            "s.session_id < ${}::uuid", _first_id(next_month(month)) if month.year < _LAST_YEAR else None
        )

    def __str__(self) -> str:
        return " AND ".join(self.conditions) or "true"


#: The month after its December is beyond Python's calendar.
_LAST_YEAR = 9999


def _first_id(month: date) -> UUID:
    """Where the UUIDv7s of a month begin."""
    milliseconds = (
        round((datetime(month.year, month.month, 1, tzinfo=_EPOCH.tzinfo) - _EPOCH).total_seconds()) * 1000
    )
    return UUID(int=milliseconds << 80)


async def export_sessions(
    database: Database,
    folder: Path,
    selection: Selection,
    *,
    kind: Format,
    begin: Callable[[int], None] = lambda _: None,
    advance: Callable[[int], None] = lambda _: None,
) -> Exported:
    """Exports the sessions of `selection`, whole; goes on where an earlier run of the same export was stopped.

    `begin` is told how many messages there are, `advance` how many were done since. Memory does not grow with
    what is exported. Raises `ArchiveRefused` where the folder holds something else, or Redis owns sessions.
    """
    if kind == "parquet":
        parquet.require()
    await require_revision(database)
    where = _Where.of(selection)
    wanted = Manifest(format=kind, schema_revision=REVISION, selection=selection.as_json())
    manifest = await asyncio.to_thread(_taken_up, folder, wanted)
    months = await _months(database, where, selection.months)
    begin(sum(months.values()))
    kept = 0
    for month, messages in months.items():
        done = manifest.months.get(month_name(month))
        if done is not None and await asyncio.to_thread(done.is_whole, folder):
            kept += 1
            advance(messages)
            continue
        manifest.complete = False
        manifest.months[month_name(month)] = await _export_month(
            database, folder, month, where, kind=kind, advance=advance
        )
        manifest.write(folder)
    manifest.complete = True
    manifest.write(folder)
    return Exported(
        sessions=sum(month.sessions.rows for month in manifest.months.values()),
        messages=sum(month.messages.rows for month in manifest.months.values()),
        kept=kept,
        months=len(manifest.months),
    )


def _taken_up(folder: Path, wanted: Manifest) -> Manifest:
    """The manifest to go on with. Raises `ArchiveRefused` where the folder is not ours to write to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = read_manifest(folder)
        if found is None:
            if any(folder.iterdir()):
                raise ArchiveRefused(
                    f"{folder} is not empty, and holds no export", hint="name another folder"
                )
            wanted.write(folder)
            return wanted
    except OSError as exc:
        raise ArchiveRefused(f"{folder} can't be written to: {exc.strerror or exc}") from exc
    for what in ("format", "selection", "schema_revision"):
        theirs, ours = getattr(found, what), getattr(wanted, what)
        if theirs != ours:
            raise ArchiveRefused(
                f"{folder / NAME} is of another export: its {what} is {theirs}, this one's {ours}",
                hint="name another folder, or the same options to go on with that one",
            )
    return found


async def _months(database: Database, where: _Where, only: Sequence[date]) -> dict[date, int]:
    """The months that have sessions, each with how many messages they count."""
    where = where.also("chat.session_month(s.session_id) = ANY (${}::date[])", list(only) or None)
    async with database.transaction() as conn:
        await conn.execute(_PATIENCE)
        records = await conn.fetch(
            "SELECT chat.session_month(s.session_id) AS month, sum(s.message_count)::int8 AS messages "
            f"FROM chat.chat_sessions s WHERE {where} GROUP BY 1 ORDER BY 1",
            *where.arguments,
            timeout=_SECONDS_MAX,
        )
    return {record["month"]: record["messages"] for record in records}


# A month may be most of the table.
_PATIENCE = (
    "SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0; "
    "SET LOCAL enable_seqscan = on; SET LOCAL plan_cache_mode = auto"
)


async def _export_month(
    database: Database,
    folder: Path,
    month: date,
    where: _Where,
    *,
    kind: Format,
    advance: Callable[[int], None],
) -> Month:
    name, its = month_name(month), where.within(month)
    async with database.transaction() as conn:
        # Before anything that would take a snapshot.
        await conn.execute(f"SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY; {_PATIENCE}")
        facts = await conn.fetchrow(
            "SELECT statement_timestamp() AS snapshot_at, min(s.created_at) AS first, max(s.last_activity) AS last, "
            "count(*) FILTER (WHERE s.owner = 'redis') AS elsewhere, "
            "(SELECT mode FROM chat.cache_state WHERE id = 1) AS mode, "
            "(SELECT version_num FROM chat.alembic_version) AS revision "
            f"FROM chat.chat_sessions s WHERE {its}",
            *its.arguments,
            timeout=_SECONDS_MAX,
        )
        assert facts is not None  # noqa: S101 - an aggregate always has a row
        _refuse(facts)
        files = {}
        for table in _TABLES:
            query, arguments = _query(table, month, where, kind)
            path = path_of(table, name, kind)
            done = advance if table == "messages" else _nothing
            files[table] = await _copied(conn, query, arguments, folder, path, done, table, kind)
    return Month(
        month=name,
        snapshot_at=format_time(facts["snapshot_at"]),
        first=format_time(facts["first"]) if facts["first"] else None,
        last=format_time(facts["last"]) if facts["last"] else None,
        sessions=files["sessions"],
        messages=files["messages"],
    )


def _nothing(_count: int) -> None: ...


_TABLES: tuple[Table, ...] = ("sessions", "messages")


def _refuse(facts: Any) -> None:
    if facts["revision"] != REVISION:
        raise ArchiveRefused(f"the schema became revision {facts['revision']} meanwhile", hint="run it again")
    if facts["mode"] not in {None, "hybrid"} or facts["elsewhere"]:
        raise ArchiveRefused(
            f"the database is in mode {facts['mode']}: Redis has messages that PostgreSQL has not",
            hint="run `chat-sessions mode hybrid` first: it takes them over; run this again after it",
        )


def _query(table: Table, month: date, where: _Where, kind: Format) -> tuple[str, tuple[object, ...]]:
    """What is copied, and its arguments."""
    alias = table[0]
    if kind == "parquet":
        time, metadata = "(extract(epoch FROM {0}) * 1000)::int8 AS {1}", "{0}::text AS {1}"
    else:
        time = """to_char({0} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"') AS {1}"""
        # A raw line break or tab in JSON is white space between two of its words.
        metadata = r"translate({0}::text, E'\n\r\t', '   ')::json AS {1}"
    columns = _COPIED[table].format(
        created_at=time.format(f"{alias}.created_at", "created_at"),
        last_activity=time.format(f"{alias}.last_activity", "last_activity"),
        metadata=metadata.format(f"{alias}.metadata", "metadata"),
    )
    its = where.within(month)
    if table == "sessions":
        rows, arguments = f"chat.chat_sessions s WHERE {its} ORDER BY s.session_id", its.arguments
    elif where.conditions:
        ids = f"SELECT s.session_id FROM chat.chat_sessions s WHERE {its}"
        rows, arguments = (
            f"chat.chat_messages m WHERE {_IN_MONTH} AND m.session_id IN ({ids}) {_ORDER}",
            its.arguments,
        )
    else:
        rows, arguments = f"chat.chat_messages m WHERE {_IN_MONTH} {_ORDER}", ()
    query = f"SELECT {columns} FROM {rows.format(month=month)}"
    if kind != "parquet":
        query = f"SELECT row_to_json(line) FROM ({query}) line"
    return query, arguments


_IN_MONTH = "m.session_month = date '{month}'"
_ORDER = "ORDER BY m.session_id, m.seq"


async def _copied(
    conn: Any,
    query: str,
    arguments: Sequence[object],
    folder: Path,
    path: str,
    advance: Callable[[int], None],
    table: Table,
    kind: Format,
) -> File:
    """Writes what `query` gives to the file, which has its name only when it is whole."""
    whole = folder / path
    half = whole.with_name(f"{whole.name}.part")
    half.parent.mkdir(parents=True, exist_ok=True)
    sink = _sink(half, table, kind)
    chunks = _Chunks(sink, advance)
    try:
        await conn.copy_from_query(
            query,
            *arguments,
            output=chunks.take,
            format="csv" if kind == "parquet" else "text",
            timeout=_SECONDS_MAX,
        )
        await chunks.end()
    finally:
        await chunks.settled()
        sink.close()
    return await asyncio.to_thread(_finished, half, whole, path, chunks.rows)


class _Chunks:
    """Gathers rows, and writes them in a thread while the next ones arrive: never more than two chunks.

    PostgreSQL sends whole rows, each as a message of its own (protocol, CopyData).
    """

    def __init__(self, sink: _Sink, advance: Callable[[int], None]) -> None:
        self._sink = sink
        self._advance = advance
        self._gathered: list[bytes] = []
        self._size = 0
        self._writing: asyncio.Future[int] | None = None
        # One thread: each has memory of its own that it does not give back.
        self._thread = ThreadPoolExecutor(max_workers=1)
        self.rows = 0

    async def take(self, data: bytes) -> None:
        self._gathered.append(data)
        self._size += len(data)
        if self._size >= _CHUNK_BYTES:
            await self._write()

    async def end(self) -> None:
        if self._gathered:
            await self._write()
        await self._written()

    async def settled(self) -> None:
        """Nothing is being written any more, whatever became of it: the file may be closed."""
        if self._writing is not None:
            await asyncio.wait([self._writing])
        self._thread.shutdown(wait=False)

    async def _write(self) -> None:
        await self._written()
        rows, self._gathered, self._size = b"".join(self._gathered), [], 0
        self._writing = asyncio.get_running_loop().run_in_executor(self._thread, self._sink.write, rows)

    async def _written(self) -> None:
        if self._writing is not None:
            count = await self._writing
            self._writing = None
            self.rows += count
            self._advance(count)


def _sink(path: Path, table: Table, kind: Format) -> _Sink:
    if kind == "parquet":
        return parquet.ParquetFile(path, table)
    return JsonLinesFile(path, compressed=kind == "jsonl.gz")


def _finished(half: Path, whole: Path, path: str, rows: int) -> File:
    settle(half, whole)
    return File(path=path, rows=rows, bytes=whole.stat().st_size, sha256=sha256_of(whole))
