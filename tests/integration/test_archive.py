"""Export and import: what goes out comes back, nothing that is stored is changed, nothing is served stale."""

import asyncio
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from app.archive import importing
from app.archive.export import export_sessions
from app.archive.importing import Imported, Source, import_sessions, sources_of
from app.archive.manifest import Selection, read_manifest
from app.archive.reading import Found, Problem
from app.chat import LEGACY_MONTH, NewMessage, new_uuid, session_month
from app.cli.import_ import bounds_of
from app.coherence.ports import Piece, Restored
from app.errors import ArchiveRefused, HistoryDiffers, ModeRefused, SessionNotFound
from app.postgres.engine import Database, create_engine
from app.redis_sessions.keys import session_key
from app.settings import Settings
from app.wiring import Runtime, Stores, open_runtime, open_stores
from tests.contract.suite import METADATA, TEXTS
from tests.databases import empty, migrate, new_database
from tests.factories import guide_value, keyed_append, new_append, new_message
from tests.integration.processes import PROJECT, called, command, environment, eventually, one_line, run

pytestmark = pytest.mark.anyio

FORMATS = ("jsonl", "jsonl.gz", "parquet")

BOUNDS = bounds_of(Settings(_env_file=None))

SESSIONS = "SELECT * FROM chat.chat_sessions ORDER BY session_id"
MESSAGES = """
SELECT session_id, session_month, seq, message_id, role, content, created_at, processing_time_ms, source_count,
       metadata::text, request_digest, request_size
FROM chat.chat_messages ORDER BY session_id, seq
"""


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Database]:
    database = Database(create_engine(url, application_name="tests"))
    try:
        yield database
    finally:
        await database.close()


async def rows_of(database: Database) -> tuple[list[Any], list[Any]]:
    async with database.connection() as conn:
        return (
            [dict(row) for row in await conn.fetch(SESSIONS)],
            [dict(row) for row in await conn.fetch(MESSAGES)],
        )


async def imported(stores: Stores, *paths: Path) -> tuple[Imported, list[Problem]]:
    problems: list[Problem] = []
    assert stores.hybrid is not None
    done = await import_sessions(stores.hybrid.restore, sources_of(paths), BOUNDS, tell=problems.append)
    return done, problems


@pytest.fixture
async def stores(settings: Settings) -> AsyncIterator[Stores]:
    async with open_stores(settings) as stores:
        yield stores


@pytest.fixture
async def runtime(settings: Settings) -> AsyncIterator[Runtime]:
    """Another instance, that serves."""
    async with open_runtime(settings) as runtime:
        yield runtime


async def new_session(runtime: Runtime, *contents: str, user_id: str = "user123") -> UUID:
    session_id = (await runtime.store.create_session(user_id)).session.session_id
    if contents:
        await runtime.store.append(new_append(session_id, *contents))
    return session_id


async def contents_of(runtime: Runtime, session_id: UUID) -> list[str]:
    history = await runtime.store.read_history(session_id, max_messages=1000)
    return [message.content for message in history.messages]


def piece_of(session: Any, messages: tuple[NewMessage, ...]) -> Piece:
    return Piece(
        session=replace(session, message_count=len(messages)),
        metadata="{}",
        first_seq=1,
        chain=bytes(8),
        messages=messages,
    )


def source_of(pieces: list[Piece]) -> Source:
    found = [Found(path=Path("file"), line=1, piece=piece) for piece in pieces]
    return Source(messages=None, flaws=list, read=lambda _: iter(found))


# The round trip

texts = st.sampled_from(list(TEXTS.values())) | st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), max_size=40
)
metadata = st.sampled_from(list(METADATA.values())) | st.dictionaries(
    st.sampled_from(["sources", "processing_time_ms", "a"]),
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | texts | st.lists(texts, max_size=2),
    max_size=3,
)
messages = st.builds(
    new_message,
    texts,
    role=st.sampled_from(["user", "assistant", "system", "tool"]),
    metadata=metadata.map(lambda value: value if isinstance(value, dict) else {"value": value}),
)
sessions = st.lists(
    st.tuples(
        texts.filter(lambda text: 1 <= len(text) <= 256), st.lists(messages, max_size=12), st.booleans()
    ),
    max_size=6,
)


@pytest.fixture(scope="session")
async def second_url(servers, anyio_backend) -> AsyncIterator[str]:
    async with new_database(servers, "chat_archive_tests") as url:
        await migrate(url)
        yield url


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_exported_is_imported_as_it_was(kind, servers, database_url, second_url, tmp_path_factory):
    @hypothesis_settings(
        max_examples=15,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(sessions=sessions)
    def check(sessions):
        asyncio.run(round_trip(sessions))

    async def round_trip(sessions):
        folder = tmp_path_factory.mktemp("export") / "out"
        first = Settings(_env_file=None, database_url=database_url, redis_url=servers.redis_url)
        second = first.model_copy(
            update={"database_url": second_url, "redis_db_sessions": 3, "redis_db_aux": 4}
        )
        async with opened(database_url) as one, opened(second_url) as two:
            for database in (one, two):
                await empty(database)
            histories = {}
            async with open_runtime(first) as runtime:
                for user_id, its, keyed in sessions:
                    session_id = await new_session(runtime, user_id=user_id)
                    if its:
                        await runtime.store.append(replace(new_append(session_id), messages=tuple(its)))
                    if keyed:
                        await runtime.store.append(keyed_append(session_id, "key", "a", "b"))
                    histories[session_id] = await runtime.store.read_history(session_id, max_messages=100)
                await export_sessions(one, folder, Selection(), kind=kind)
            async with open_runtime(second) as runtime:
                done, problems = await imported(runtime.stores, folder)
                assert problems == []
                assert done.sessions_made == len(sessions)
                for session_id, history in histories.items():
                    again = await runtime.store.read_history(session_id, max_messages=100)
                    assert (again.session, again.body) == (history.session, history.body)
            assert await rows_of(two) == await rows_of(one)

    check()


async def test_ids_without_a_time_go_out_and_come_back_as_month_legacy(
    runtime, stores, redis, database, tmp_path
):
    session_id = uuid4()
    await redis.set(session_key(session_id), guide_value(session_id, "a", "b"), ex=60)
    assert await contents_of(runtime, session_id) == ["a", "b"]
    before = await rows_of(database)

    await export_sessions(database, tmp_path / "out", Selection(months=(LEGACY_MONTH,)), kind="jsonl")
    await runtime.store.delete_session(session_id)
    done, problems = await imported(stores, tmp_path / "out")

    assert (done.messages_added, problems) == (2, [])
    assert await rows_of(database) == before


async def test_a_second_import_adds_nothing_and_says_how_much_was_known(runtime, stores, database, tmp_path):
    await new_session(runtime, "a", "b", "c")
    await new_session(runtime)
    await export_sessions(database, tmp_path / "out", Selection(), kind="jsonl")
    before = await rows_of(database)

    done, problems = await imported(stores, tmp_path / "out")

    assert asdict(done) == asdict(Imported(sessions_known=2, messages_known=3))
    assert problems == []
    assert await rows_of(database) == before


async def test_a_long_session_comes_back_in_pieces(runtime, stores, database, tmp_path, monkeypatch):
    session_id = await new_session(runtime)
    for start in range(0, 2500, 100):
        await runtime.store.append(new_append(session_id, *(f"{start + index}" for index in range(100))))
    before = await rows_of(database)
    await export_sessions(database, tmp_path / "out", Selection(), kind="parquet")
    await runtime.store.delete_session(session_id)

    done, problems = await imported(stores, tmp_path / "out")

    assert (done.sessions_made, done.messages_added, problems) == (1, 2500, [])
    assert await rows_of(database) == before

    again, _ = await imported(stores, tmp_path / "out")

    assert asdict(again) == asdict(Imported(sessions_known=1, messages_known=2500))


async def test_metadata_stands_in_parquet_byte_for_byte(runtime, database, tmp_path):
    import pyarrow.parquet

    session_id = await new_session(runtime, "a")
    text = '{ "b" : 1.10,\n"a": 1e+16 }'
    async with database.connection() as conn:
        await conn.execute("UPDATE chat.chat_messages SET metadata = $1::text::json", text)

    await export_sessions(database, tmp_path / "out", Selection(), kind="parquet")

    month = f"month={session_month(session_id):%Y-%m}"
    table = pyarrow.parquet.ParquetFile(tmp_path / "out" / "messages" / month / "messages.parquet").read()
    assert table["metadata"].to_pylist() == [text]


# What is selected


async def test_a_selection_exports_whole_sessions_of_it_and_no_others(runtime, database, tmp_path):
    first = await new_session(runtime, "a", "b", user_id="Nguyễn O'Hara")
    second = await new_session(runtime, "c", user_id="user2")
    created = (await runtime.store.get_session(second)).session.created_at
    chosen = {
        "user": (Selection(user_id="Nguyễn O'Hara"), {first}),
        "session": (Selection(session_ids=(second,)), {second}),
        "from": (Selection(since=created), {second}),
        "to": (Selection(until=created), {first}),
        "another month": (Selection(months=(LEGACY_MONTH,)), set()),
    }
    for name, (selection, expected) in chosen.items():
        done = await export_sessions(database, tmp_path / name, selection, kind="jsonl")

        lines = [
            json.loads(line)
            for path in (tmp_path / name).rglob("*.jsonl")
            for line in path.read_bytes().splitlines()
        ]
        assert {UUID(line["session_id"]) for line in lines} == expected, name
        counts = [(await runtime.store.get_session(one)).session.message_count for one in expected]
        assert done.messages == sum("seq" in line for line in lines) == sum(counts)


async def test_an_export_while_writers_append_holds_a_beginning_of_every_session(runtime, database, tmp_path):
    ids = [await new_session(runtime, "0") for _ in range(20)]
    stop = asyncio.Event()

    async def write(session_id):
        number = 0
        while not stop.is_set():
            number += 1
            await runtime.store.append(new_append(session_id, str(number)))

    writers = [asyncio.create_task(write(session_id)) for session_id in ids]
    for attempt in range(5):
        await export_sessions(database, tmp_path / str(attempt), Selection(), kind="jsonl")
    stop.set()
    await asyncio.gather(*writers)

    for attempt in range(5):
        out = tmp_path / str(attempt)
        lines = [
            json.loads(line)
            for path in (out / "messages").rglob("*.jsonl")
            for line in path.read_bytes().splitlines()
        ]
        counts = {
            one["session_id"]: one["message_count"]
            for path in (out / "sessions").rglob("*.jsonl")
            for one in map(json.loads, path.read_bytes().splitlines())
        }
        assert len(counts) == 20
        for session_id, count in counts.items():
            its = [line["content"] for line in lines if line["session_id"] == session_id]
            assert its == [str(number) for number in range(count)]


# Going on


@pytest.fixture
async def many(runtime, database):
    """Sessions in two months."""
    await new_session(runtime, *(["x" * 1000] * 90))
    session_id = uuid4()
    pieces = [piece_of((await runtime.store.get_session(await new_session(runtime, "y"))).session, ())]
    legacy = replace(pieces[0].session, session_id=session_id)
    messages = tuple(new_message(str(number)) for number in range(10))
    [restored] = await runtime.stores.hybrid.restore([piece_of(legacy, messages)])
    assert isinstance(restored, Restored)
    return session_id


async def test_a_finished_month_is_kept_and_what_is_missing_or_spoilt_is_made_anew(many, database, tmp_path):
    out = tmp_path / "out"
    await export_sessions(database, out, Selection(), kind="jsonl")
    whole = {path: path.read_bytes() for path in out.rglob("*.jsonl")}
    [spoilt] = (out / "messages" / "month=legacy").iterdir()
    spoilt.write_bytes(spoilt.read_bytes().replace(b'"7"', b'"8"'))

    done = await export_sessions(database, out, Selection(), kind="jsonl")

    assert (done.months, done.kept) == (2, 1)
    assert {path: path.read_bytes() for path in out.rglob("*.jsonl")} == whole


async def test_what_has_its_name_is_on_disk_and_so_is_its_name(many, database, tmp_path, monkeypatch):
    """A power cut is not to be had here: what is asked of the system, and in which order, is."""
    asked: list[tuple[str, int]] = []
    wanted: list[tuple[str, int]] = []
    os_fsync, path_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        os_fsync(descriptor)
        asked.append(("on disk", os.fstat(descriptor).st_ino))

    def replace_path(half: Path, whole: Path) -> Path:
        file, folder = half.stat().st_ino, whole.parent.stat().st_ino
        asked.append(("named", file))
        wanted.extend([("on disk", file), ("named", file), ("on disk", folder)])
        return path_replace(half, whole)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace_path)

    await export_sessions(database, tmp_path / "out", Selection(), kind="jsonl")

    assert asked == wanted
    # Two months of two files, and the manifest at the beginning, after each month, and at the end.
    assert len([what for what, _ in asked if what == "named"]) == 8


class Stopped(Exception):
    """As by Ctrl-C."""


async def test_an_export_that_is_made_anew_and_stopped_half_way_is_half_an_export(many, database, tmp_path):
    out = tmp_path / "out"
    await export_sessions(database, out, Selection(), kind="jsonl")
    before = (out / "manifest.json").read_bytes()
    for path in out.glob("messages/*/*.jsonl"):
        path.write_bytes(b"spoilt")

    def advance(_count: int) -> None:
        if (out / "manifest.json").read_bytes() != before:
            raise Stopped

    with pytest.raises(Stopped):
        await export_sessions(database, out, Selection(), kind="jsonl", advance=advance)

    with pytest.raises(ArchiveRefused, match="half an export"):
        sources_of([out])


def killed_at_its_first_file(out: Path, database_url: str, cwd: Path) -> None:
    with subprocess.Popen(
        command("export", str(out)), env=environment(DATABASE_URL=database_url), cwd=cwd
    ) as process:
        try:
            # Of messages: the manifest is written beside itself as well, before there is anything to go on with.
            eventually(lambda: list(out.glob("messages/*/*.part")))
        finally:
            process.send_signal(signal.SIGKILL)


async def test_an_export_that_was_killed_goes_on_where_it_was(many, database, database_url, tmp_path):
    out, legacy = tmp_path / "out", tmp_path / "out" / "messages" / "month=legacy" / "messages.jsonl"
    async with database.transaction() as conn:
        # The export waits here, with its first file begun. To start takes it seconds where the machine is busy.
        await conn.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
        await conn.execute("LOCK TABLE chat.chat_messages_legacy IN ACCESS EXCLUSIVE MODE")
        await asyncio.to_thread(killed_at_its_first_file, out, database_url, tmp_path)
    assert list(out.rglob("*.part"))
    assert not legacy.exists()
    manifest = read_manifest(out)
    assert manifest is not None
    assert not manifest.complete
    with pytest.raises(ArchiveRefused, match="half an export"):
        sources_of([out])

    done = await export_sessions(database, out, Selection(), kind="jsonl")

    assert read_manifest(out).complete
    assert (done.months, done.messages) == (2, 101)
    assert not list(out.rglob("*.part"))


async def test_a_manifest_that_names_a_file_outside_of_its_folder_is_refused(many, database, tmp_path):
    """It may come from anywhere; and that file would be read, whatever it is."""
    out = tmp_path / "out"
    await export_sessions(database, out, Selection(), kind="jsonl")
    fields = json.loads((out / "manifest.json").read_bytes())
    file = fields["months"][0]["messages"]
    (out / file["path"]).rename(tmp_path / "elsewhere.jsonl")
    for path in ("../elsewhere.jsonl", str(tmp_path / "elsewhere.jsonl")):
        file["path"] = path
        (out / "manifest.json").write_text(json.dumps(fields), encoding="utf-8")

        with pytest.raises(ArchiveRefused, match="outside of its folder"):
            sources_of([out])


async def test_what_leads_to_nothing_that_can_be_imported_is_refused_and_says_why(database, tmp_path):
    await export_sessions(database, tmp_path / "out", Selection(), kind="jsonl")
    alone = tmp_path / "messages.parquet"
    strays = [
        folder / "chat_messages" / "month=2020-01" / "messages.jsonl"
        for folder in (tmp_path, tmp_path / "out")
    ]
    for path in (alone, *strays):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    for path, why in (
        (tmp_path / "nothing.jsonl", "is not there"),
        (tmp_path, "holds no manifest.json"),
        (alone, "does not lie in an export"),
        *((stray, "is of a month that .*manifest.json does not name") for stray in strays),
    ):
        with pytest.raises(ArchiveRefused, match=why):
            sources_of([path])


async def test_a_folder_of_another_export_or_of_other_files_is_refused(database, tmp_path):
    await export_sessions(database, tmp_path / "a", Selection(), kind="jsonl")
    with pytest.raises(ArchiveRefused, match="of another export: its selection"):
        await export_sessions(database, tmp_path / "a", Selection(user_id="x"), kind="jsonl")
    with pytest.raises(ArchiveRefused, match="of another export: its format"):
        await export_sessions(database, tmp_path / "a", Selection(), kind="parquet")
    with pytest.raises(ArchiveRefused, match="is not empty"):
        await export_sessions(database, tmp_path, Selection(), kind="jsonl")


# Bad files


async def test_a_file_that_is_not_as_it_was_written_is_left_out_and_named(
    many, database, stores, runtime, tmp_path
):
    out = tmp_path / "out"
    await export_sessions(database, out, Selection(), kind="jsonl")
    [spoilt] = (out / "messages" / "month=legacy").iterdir()
    spoilt.write_bytes(spoilt.read_bytes().replace(b'"7"', b'"8"'))
    await runtime.store.delete_session(many)

    done, [problem] = await imported(stores, out)

    assert (problem.path, problem.line) == (spoilt, None)
    assert "sha256" in problem.reason
    assert (done.sessions_made, done.sessions_known, done.problems) == (0, 2, 1)


def rewrite(out: Path, table: str, change: Any) -> Path:
    """Changes the lines of an export's only file of a table, and forgets the hashes."""
    [path] = (out / table).rglob("*.jsonl")
    path.write_bytes(b"".join(line + b"\n" for line in change(path.read_bytes().splitlines())))
    manifest = json.loads((out / "manifest.json").read_text())
    for month in manifest["months"]:
        its = out / month[table]["path"]
        month[table] |= {"bytes": its.stat().st_size, "sha256": hashlib.sha256(its.read_bytes()).hexdigest()}
    (out / "manifest.json").write_text(json.dumps(manifest))
    return path


BROKEN = {
    "no JSON": (b"{oops", "should be JSON"),
    "no object": (b"[1]", "should be a JSON object"),
    "a NUL": (b'"content":"\\u0000"', "NUL"),
    "half a surrogate": (b'"content":"\\ud800"', "surrogate"),
    "no role": (b'"role":"king"', "role: should be one of"),
    "an id that is none": (b'"message_id":"7"', "message_id: should be a UUID"),
    "no time": (b'"created_at":"yesterday"', "created_at: should be a time"),
    "a time that is none of ours": (b'"created_at":"1999-01-01T00:00:00Z"', "between the year 2000"),
    "a number that is none": (b'"metadata":{"a":1e999}', "beyond the range"),
    "metadata that is none": (b'"metadata":[]', "metadata: should be a JSON object"),
    "a key twice": (b'"metadata":{"a":1,"a":2}', "more than once"),
    "too much": (b'"content":"' + b"x" * 300_000 + b'"', "content: has 300000 bytes"),
    "too deep": (b'"metadata":{"a":' + b"[" * 40 + b"]" * 40 + b"}", "levels deep"),
    "a gap": (b'"seq":7', "seq: is 7, 2 should follow"),
}


@pytest.mark.parametrize(("broken", "reason"), BROKEN.values(), ids=BROKEN)
async def test_a_broken_line_is_named_and_the_rest_is_imported(
    broken, reason, runtime, stores, database, tmp_path
):
    first = await new_session(runtime, "a", "b", "c")
    second = await new_session(runtime, "d")
    out = tmp_path / "out"
    await export_sessions(database, out, Selection(), kind="jsonl")
    name = broken.partition(b":")[0]

    def change(lines):
        if broken.startswith(b'"'):
            value = rb'(?:\{\}|"[^"]*"|[0-9]+)'
            lines[1], count = re.subn(re.escape(name) + b":" + value, broken.replace(b"\\", rb"\\"), lines[1])
            assert count == 1
        else:
            lines[1] = broken
        return lines

    path = rewrite(out, "messages", change)
    await runtime.store.delete_session(first)
    await runtime.store.delete_session(second)

    done, problems = await imported(stores, out)

    assert (problems[0].path, problems[0].line) == (path, 2)
    assert reason in problems[0].reason
    assert (done.sessions_made, done.messages_added) == (2, 2)
    assert await contents_of(runtime, first) == ["a"]
    assert await contents_of(runtime, second) == ["d"]


async def test_a_session_that_is_not_in_its_place_is_named_and_not_made_without_its_messages(
    runtime, stores, database, tmp_path
):
    """Both files are read beside each other, once: its messages have been passed by."""
    first, second = [await new_session(runtime, contents) for contents in "ab"]
    out = tmp_path / "out"
    await export_sessions(database, out, Selection(), kind="jsonl")
    path = rewrite(out, "sessions", lambda lines: [*reversed(lines)])
    await runtime.store.delete_session(first)
    await runtime.store.delete_session(second)

    done, problems = await imported(stores, out)

    assert (done.sessions_made, done.messages_added) == (1, 1)
    assert [one.line for one in problems if one.path == path] == [2]
    assert f"session {first} does not follow {second}" in "".join(one.reason for one in problems)
    assert await contents_of(runtime, second) == ["b"]
    with pytest.raises(SessionNotFound):
        await contents_of(runtime, first)


async def test_a_broken_session_is_named_with_the_messages_that_it_leaves(
    runtime, stores, database, tmp_path
):
    first, second = await new_session(runtime, "a", "b"), await new_session(runtime, "c")
    out = tmp_path / "out"
    await export_sessions(database, out, Selection(), kind="jsonl")
    path = rewrite(out, "sessions", lambda lines: [lines[0].replace(b'"user123"', b'""'), *lines[1:]])
    await runtime.store.delete_session(first)
    await runtime.store.delete_session(second)

    done, problems = await imported(stores, out)

    assert [(problem.path.name, problem.line) for problem in problems] == [
        (path.name, 1),
        ("messages.jsonl", 1),
    ]
    assert (done.sessions_made, done.messages_added) == (1, 1)


# The guide's backup


def backup_of(*values: bytes) -> bytes:
    """As the guide's commands write it: what `GET` answers, a line break of `redis-cli`, one of `echo`."""
    return b"".join(value + b"\n\n" for value in values)


async def test_the_guides_backup_is_taken_in_and_a_second_time_it_is_known(runtime, stores, tmp_path):
    ids = [uuid4(), uuid4(), uuid4()]
    pretty = json.dumps(
        json.loads(guide_value(ids[1], "c", "d]}", "}")), indent=4, ensure_ascii=False
    ).encode()
    path = tmp_path / "sessions_backup.json"
    path.write_bytes(
        backup_of(guide_value(ids[0], "a", "b"), b"", pretty) + pretty + b"\n" + guide_value(ids[2])
    )

    done, problems = await imported(stores, path)
    again, _ = await imported(stores, path)

    assert problems == []
    assert (done.sessions_made, done.sessions_known, done.messages_added) == (3, 1, 5)
    assert (again.sessions_made, again.sessions_known, again.messages_added) == (0, 4, 0)
    assert await contents_of(runtime, ids[0]) == ["a", "b"]
    assert await contents_of(runtime, ids[1]) == ["c", "d]}", "}"]
    assert await contents_of(runtime, ids[2]) == []


async def test_a_backup_of_our_own_entries_is_taken_in(runtime, stores, redis, database, tmp_path):
    session_id = await new_session(runtime, "a", "b\nc")
    await contents_of(runtime, session_id)
    value = await redis.get(session_key(session_id))
    assert value.count(b"\n") == 2
    before = await rows_of(database)
    (tmp_path / "b.json").write_bytes(backup_of(value, value))
    await runtime.store.delete_session(session_id)

    done, problems = await imported(stores, tmp_path / "b.json")

    assert (done.messages_added, done.messages_known, problems) == (2, 2, [])
    assert await rows_of(database) == before


def spoilt_value(**fields: Any) -> bytes:
    return json.dumps(json.loads(guide_value(uuid4(), "a")) | fields).encode()


STRANGE = {
    "an error of Redis": (b"(error) WRONGTYPE Operation against a key", "should be JSON"),
    "a value that was cut": (guide_value(uuid4(), "a")[:-20], "should be JSON"),
    "a pretty one that was cut": (
        json.dumps(json.loads(guide_value(uuid4(), "a")), indent=4).encode()[:-9],
        "JSON",
    ),
    "no session": (b"[1,2]", "should be a session"),
    "no id": (spoilt_value(session_id=None), "session_id: should be a text"),
    "no user": (spoilt_value(user_id=7), "user_id: should be a text, is 7"),
    "no creation": (spoilt_value(created_at=None), "created_at: should be a time"),
    "a strange role": (spoilt_value(messages=[{"role": "king"}]), "messages.0."),
    "no content": (
        spoilt_value(messages=[{"role": "user", "content": 1}]),
        "messages.0.content: should be a text",
    ),
    "no time": (
        spoilt_value(messages=[{"role": "user", "content": ""}]),
        "messages.0.timestamp: should be a time",
    ),
    "a window": (
        spoilt_value(
            messages=[{"role": "user", "content": "", "timestamp": "2025-11-14T10:30:00Z", "seq": 5}]
        ),
        "messages.0.seq: is 5, 1 should stand here",
    ),
}


@pytest.mark.parametrize(("value", "reason"), STRANGE.values(), ids=STRANGE)
async def test_a_strange_value_is_named_with_its_line_and_the_rest_is_imported(
    value, reason, stores, tmp_path
):
    path = tmp_path / "sessions_backup.json"
    path.write_bytes(backup_of(guide_value(uuid4(), "a"), value, guide_value(uuid4(), "b")))

    done, [problem] = await imported(stores, path)

    assert (problem.path, problem.line) == (path, 3)
    assert reason in problem.reason
    assert (done.sessions_made, done.messages_added) == (2, 2)


# Beside a service


async def test_a_cached_session_that_grows_by_an_import_is_not_served_as_it_was(runtime, stores, redis):
    session_id = await new_session(runtime, "a", "b")
    assert await contents_of(runtime, session_id) == ["a", "b"]
    history = await runtime.store.read_history(session_id, max_messages=10)
    assert history.source == "redis"

    grown = piece_of(history.session, (*history.messages, new_message("c")))
    [restored] = await stores.hybrid.restore([grown])

    assert restored == Restored(created=False, added=1, known=2)
    assert await contents_of(runtime, session_id) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("bound", "sessions", "contents", "batches"),
    [
        ("_BATCH_SESSIONS", 7, ["a"], [3, 3, 1]),
        ("_BATCH_MESSAGES", 5, ["a", "b"], [1, 1, 1, 1, 1]),
        # Two each, of their metadata; the one that reaches the bound goes with those before it.
        ("_BATCH_BYTES", 5, [""], [2, 2, 1]),
    ],
)
async def test_an_import_holds_the_locks_of_a_bounded_batch_at_once(
    runtime, stores, monkeypatch, bound, sessions, contents, batches
):
    monkeypatch.setattr(importing, bound, 3)
    session = (await runtime.store.create_session("user123")).session
    pieces = [
        piece_of(
            replace(session, session_id=new_uuid()),
            tuple(new_message(content, metadata={}) for content in contents),
        )
        for _ in range(sessions)
    ]
    sizes = []

    async def restore(batch):
        sizes.append(len(batch))
        return await stores.hybrid.restore(batch)

    done = await import_sessions(restore, [source_of(pieces)], BOUNDS, tell=print)

    assert (sizes, done.sessions_made) == (batches, sessions)


async def test_an_import_says_what_it_made_what_grew_and_what_was_known(runtime, stores, monkeypatch):
    monkeypatch.setattr(importing, "_BATCH_SESSIONS", 2)
    sessions = [(await runtime.store.create_session("user123")).session for _ in range(2)]
    sessions.append(replace(sessions[0], session_id=new_uuid()))
    messages = tuple(new_message(content) for content in "abc")
    for session in sessions[:2]:
        await stores.hybrid.restore([piece_of(session, messages[:2])])
    pieces = [piece_of(session, messages[: 2 + index]) for index, session in enumerate(sessions)]
    advanced = []

    done = await import_sessions(
        stores.hybrid.restore, [source_of(pieces)], BOUNDS, tell=print, advance=advanced.append
    )

    assert asdict(done) == asdict(
        Imported(sessions_made=1, sessions_grown=1, sessions_known=1, messages_added=4, messages_known=4)
    )
    assert advanced == [5, 3]


async def test_a_deleted_session_is_imported_again_and_served(runtime, stores, database, tmp_path):
    session_id = await new_session(runtime, "a", "b")
    await contents_of(runtime, session_id)
    await export_sessions(database, tmp_path / "out", Selection(), kind="jsonl")
    await runtime.store.delete_session(session_id)

    done, _ = await imported(stores, tmp_path / "out")

    assert done.sessions_made == 1
    assert await contents_of(runtime, session_id) == ["a", "b"]
    await runtime.store.append(new_append(session_id, "c"))
    assert await contents_of(runtime, session_id) == ["a", "b", "c"]


async def test_another_history_another_user_and_a_gap_are_refused_and_nothing_changes(
    runtime, stores, database
):
    session_id = await new_session(runtime, "a", "b")
    history = await runtime.store.read_history(session_id, max_messages=10)
    before = await rows_of(database)
    others = {
        "shorter": (new_message("x"),),
        "as long": (history.messages[0], new_message("x")),
        "longer": (history.messages[0], new_message("x"), new_message("y")),
    }
    pieces = [piece_of(history.session, messages) for messages in others.values()]
    pieces.append(piece_of(replace(history.session, user_id="somebody"), history.messages))
    pieces.append(replace(piece_of(history.session, (new_message("x"),)), first_seq=4))

    outcomes = [(await stores.hybrid.restore([piece]))[0] for piece in pieces]

    assert [type(outcome) for outcome in outcomes] == [HistoryDiffers] * 5
    assert await rows_of(database) == before
    [shorter] = await stores.hybrid.restore([piece_of(history.session, history.messages[:1])])
    assert shorter == Restored(created=False, added=0, known=1)
    assert await rows_of(database) == before


async def test_what_redis_holds_for_itself_comes_first(runtime, stores, redis, tmp_path):
    session_id = uuid4()
    value = guide_value(session_id, "a", "b")
    await redis.set(session_key(session_id), value, ex=60)
    shorter = json.loads(value)
    shorter["messages"].pop()

    (tmp_path / "b.json").write_text(json.dumps(shorter))
    [found] = importing.backup(tmp_path / "b.json", BOUNDS)
    [restored] = await stores.hybrid.restore([found.piece])

    assert restored == Restored(created=False, added=0, known=1)
    assert await contents_of(runtime, session_id) == ["a", "b"]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (b'{"messages": 1}', "is no session"),
        (b'{"session_id": "%s", "messages": [{"role": "user"}]}', "can't be read back"),
    ],
)
async def test_what_redis_holds_and_nobody_can_read_is_named_and_the_rest_is_imported(
    runtime, stores, redis, tmp_path, value, why
):
    ids = [uuid4(), uuid4()]
    (tmp_path / "b.json").write_bytes(b"\n".join(guide_value(one, "a") for one in ids))
    value = value.replace(b"%s", str(ids[0]).encode())
    await redis.set(session_key(ids[0]), value, ex=60)

    done, problems = await imported(stores, tmp_path / "b.json")

    assert (done.sessions_made, done.problems) == (1, 1)
    assert re.search(rf"{why}.*\(.*remove", problems[0].reason)
    assert await redis.get(session_key(ids[0])) == value
    assert await contents_of(runtime, ids[1]) == ["a"]


async def test_two_imports_at_once_double_nothing(runtime, stores, settings, database, tmp_path):
    ids = [await new_session(runtime, "a", "b") for _ in range(300)]
    await export_sessions(database, tmp_path / "out", Selection(), kind="jsonl")
    before = await rows_of(database)
    async with database.connection() as conn:
        await conn.execute("DELETE FROM chat.chat_messages; DELETE FROM chat.chat_sessions")

    async with open_stores(settings, follows=False) as other:
        both = await asyncio.gather(imported(stores, tmp_path / "out"), imported(other, tmp_path / "out"))

    assert [problems for _, problems in both] == [[], []]
    assert sum(done.sessions_made for done, _ in both) == len(ids)
    assert sum(done.messages_added for done, _ in both) == 2 * len(ids)
    assert await rows_of(database) == before


async def test_while_redis_owns_sessions_both_are_refused(runtime, stores, database, settings, tmp_path):
    session_id = await new_session(runtime, "a")
    history = await runtime.store.read_history(session_id, max_messages=10)
    async with database.connection() as conn:
        await conn.execute("UPDATE chat.cache_state SET mode = 'draining'")
    with pytest.raises(ArchiveRefused, match="chat-sessions mode hybrid"):
        await export_sessions(database, tmp_path / "out", Selection(), kind="jsonl")
    with pytest.raises(ModeRefused, match="chat-sessions mode hybrid"):
        await stores.hybrid.restore([piece_of(history.session, (*history.messages, new_message("b")))])


# The commands


async def test_the_commands_say_what_they_did_and_end_with_1_where_something_was_left_out(
    runtime, database_url, servers, tmp_path
):
    await new_session(runtime, "a", "b")
    urls = {"DATABASE_URL": database_url, "REDIS_URL": servers.redis_url}

    async def call(*words, by=called):
        return await asyncio.to_thread(by, *words, cwd=tmp_path, **urls)

    exported = await call("export", "out", "--format", "jsonl.gz", by=run)
    assert (exported.returncode, exported.stderr) == (0, "")
    assert exported.stdout == "1 session with 2 messages in 1 month: out\n"
    done = await call("import", "out", "--json")
    assert done.returncode == 0, done
    assert json.loads(done.stdout)["messages_known"] == 2
    [path] = (tmp_path / "out" / "messages").rglob("*.gz")
    single = await call("import", str(path), "--json")
    assert json.loads(single.stdout)["messages_known"] == 2
    (tmp_path / "b.json").write_bytes(guide_value(uuid4(), "x") + b"\nWRONGTYPE\n")
    broken = await call("import", "b.json")
    assert broken.returncode == 1
    assert broken.stderr.startswith("left out: b.json:2: should be JSON")
    assert "is not there" in one_line(await call("import", "nothing.json"))


async def test_parquet_without_its_extra_says_what_to_install(database_url, tmp_path):
    (tmp_path / "pyarrow.py").write_text("raise ImportError('none')")
    settings = environment(DATABASE_URL=database_url)
    settings["PYTHONPATH"] = f"{tmp_path}:{settings['PYTHONPATH']}"
    done = await asyncio.to_thread(
        subprocess.run,
        command("export", "out", "--format", "parquet"),
        env=settings,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"{sys.executable} -m pip install 'chat-sessions[export]'" in one_line(done)


async def test_the_documented_queries_of_duckdb_answer(runtime, database, tmp_path, monkeypatch):
    import duckdb

    session_id = await new_session(runtime)
    answer = new_message("b", role="assistant", metadata={"sources": ["x", "y"], "processing_time_ms": 30})
    await runtime.store.append(
        replace(
            new_append(session_id), messages=(new_message("a"), answer, replace(answer, message_id=uuid4()))
        )
    )
    await export_sessions(database, tmp_path / "out", Selection(), kind="parquet")
    monkeypatch.chdir(tmp_path)
    page = (PROJECT / "docs" / "export.md").read_text()
    [block] = re.findall(r"```sql\n(.*?)```", page, re.DOTALL)

    with duckdb.connect() as conn:
        [[_, questions, median], *_], sources = (
            conn.execute(query).fetchall() for query in block.split(";\n") if query.strip()
        )

    assert (questions, median) == (1, 30)
    assert sources == [("x", 2, 1), ("y", 2, 1)]
