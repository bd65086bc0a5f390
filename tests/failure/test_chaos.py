"""The chaos harness at work for a few seconds, and its own parts: the wire, and the verdict."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from uuid import UUID, uuid4
from xml.etree import ElementTree as ET

import pytest

from tests.failure.chaos.__main__ import say, told
from tests.failure.chaos.proxy import LOOPBACK, Link
from tests.failure.chaos.record import Fault, Operation, Record, Session
from tests.failure.chaos.report import page, picture
from tests.failure.chaos.run import Options, free_port, run
from tests.failure.chaos.verdict import Verdict, judge

SECONDS = 12


# Connections that are cut while they are made are left to the garbage collector by their libraries.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_real_processes_keep_their_promise_while_everything_breaks() -> None:
    seed = int(os.environ.get("CHAOS_SEED") or datetime.now(UTC).strftime("%Y%m%d"))
    say(f"CHAOS_SEED={seed}")
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # on connections that we cut ourselves

    outcome = asyncio.run(run(Options(seconds=SECONDS, seed=seed, profile="short", clients=8)))

    summary = outcome.summary()
    say("\n".join(told(outcome, outcome.verdict.wrong)))
    assert outcome.verdict.wrong == [], f"CHAOS_SEED={seed}"
    # Else there was nothing to check.
    assert summary["operations"]["acked writes"] > 50
    assert summary["operations"]["reads"] > 100
    assert len(summary["faults"]) > 5
    assert "0 violations" in page([summary])
    assert ET.fromstring(picture(outcome.timeline())).tag.endswith("svg")


# The wire


class Echo(asyncio.Protocol):
    """Answers what it was sent, and keeps it in `received`."""

    def __init__(self, received: "asyncio.Queue[bytes]") -> None:
        self.received = received

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received.put_nowait(data)
        self.transport.write(data)


@asynccontextmanager
async def wire(
    received: "asyncio.Queue[bytes]",
) -> AsyncIterator[tuple[Link, asyncio.StreamReader, asyncio.StreamWriter]]:
    """A link to an echo, and a connection over it that has been used."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Echo(received), LOOPBACK, 0)
    upstream = server.sockets[0].getsockname()[1]
    link = Link(free_port(), lambda: upstream)
    await link.open()
    reader, writer = await asyncio.open_connection(LOOPBACK, link.port)
    writer.write(b"first")
    assert await reader.readexactly(5) == b"first"
    received.get_nowait()
    try:
        yield link, reader, writer
    finally:
        writer.close()
        link.abandon()
        server.close()


@pytest.mark.anyio
async def test_a_cut_link_resets_and_refuses() -> None:
    async with wire(asyncio.Queue()) as (link, reader, _):
        await link.change("cut")
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(LOOPBACK, link.port)
        await link.change("ok")
        _, writer = await asyncio.open_connection(LOOPBACK, link.port)
        writer.close()


@pytest.mark.anyio
async def test_a_hole_swallows_and_resets_in_the_end() -> None:
    received: asyncio.Queue[bytes] = asyncio.Queue()
    async with wire(received) as (link, reader, writer):
        await link.change("hole")
        writer.write(b"lost")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await reader.readexactly(1)
        await link.change("ok")
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
    assert received.empty()


@pytest.mark.anyio
async def test_a_slow_link_keeps_the_order() -> None:
    async with wire(asyncio.Queue()) as (link, reader, writer):
        await link.change("slow", delay_seconds=0.03)
        began = time.monotonic()
        writer.write(b"one")
        await asyncio.sleep(0.005)
        await link.change("ok")
        writer.write(b"two")
        assert await reader.readexactly(6) == b"onetwo"
        assert time.monotonic() - began >= 0.025


@pytest.mark.anyio
async def test_a_lost_reply_was_to_a_request_that_arrived() -> None:
    received: asyncio.Queue[bytes] = asyncio.Queue()
    async with wire(received) as (link, reader, writer):
        await link.change("reply_lost")
        writer.write(b"done")
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
    assert received.get_nowait() == b"done"


@pytest.mark.anyio
async def test_a_late_request_arrives_after_its_client_has_gone() -> None:
    received: asyncio.Queue[bytes] = asyncio.Queue()
    async with wire(received) as (link, _, writer):
        await link.change("late", delay_seconds=0.02)
        writer.write(b"late")
        await asyncio.sleep(0.03)
        assert received.empty()
        writer.close()
        async with asyncio.timeout(5):
            assert await received.get() == b"late"


# The verdict

SESSION = UUID("01998f2e-5b7c-7d3a-9f10-2b6d4c8e1a55")
ONE, TWO = uuid4(), uuid4()


def judged(*operations: Operation, final: tuple[UUID, ...] = (ONE, TWO), doomed: bool = False) -> Verdict:
    """Of one session in which two messages were acknowledged at 1 and at 2 s."""
    record = Record(began=0.0)
    writes = [
        Operation("append", at - 0.1, at, 0, 200, message_ids=(message_id,), first_seq=int(at))
        for at, message_id in ((1.0, ONE), (2.0, TWO))
    ]
    session = Session(SESSION, 0.0, doomed=doomed, operations=[*writes, *operations])
    record.sessions[SESSION] = session
    record.faults.append(Fault("postgres_stop", 20.0, frozenset({"postgres"}), 21.0))
    return judge(record, {SESSION: final} if final else {}, instances=2, reads_may_fail=False)


def read(began: float, *message_ids: UUID, status: int = 200, labelled: bool = False) -> Operation:
    """It took 10 ms."""
    length = len(message_ids) if status == 200 else None
    return Operation(
        "history", began, began + 0.01, 0, status, labelled=labelled, message_ids=message_ids, length=length
    )


@pytest.mark.parametrize(
    ("operations", "final"),
    [
        ([read(1.5, ONE), read(1.95, ONE), read(3, ONE, TWO)], (ONE, TWO)),
        ([read(3, ONE, labelled=True)], (ONE, TWO)),
        ([Operation("count", 3, 3.1, 0, 200, length=2)], (ONE, TWO)),
        # Whatever PostgreSQL's trouble has left behind in three seconds.
        ([read(20.5, status=503), read(23.9, status=503)], (ONE, TWO)),
    ],
)
def test_what_may_be_is_no_violation(operations: list[Operation], final: tuple[UUID, ...]) -> None:
    assert judged(*operations, final=final).wrong == []


@pytest.mark.parametrize(
    ("kind", "operations", "final"),
    [
        ("stale", [read(3, ONE)], (ONE, TWO)),
        ("stale", [Operation("unchanged", 3, 3.1, 0, 304, length=1)], (ONE, TWO)),
        ("non-monotonic", [read(1.91, ONE, TWO), read(1.95, ONE)], (ONE, TWO)),
        ("no prefix", [read(3, TWO, ONE)], (ONE, TWO)),
        ("no prefix", [Operation("count", 3, 3.1, 0, 200, length=3)], (ONE, TWO)),
        ("labelled read, no prefix", [read(3, TWO, labelled=True)], (ONE, TWO)),
        ("lost", [], (ONE,)),
        ("lost", [], ()),
        ("duplicate", [], (ONE, TWO, TWO)),
        ("not sent", [], (ONE, TWO, uuid4())),
        ("wrong seq", [], (TWO, ONE)),
        ("failed read", [read(10, status=503)], (ONE, TWO)),
        ("failed read", [read(24.5, status=503)], (ONE, TWO)),
        ("failed read", [read(10, status=404)], (ONE, TWO)),
    ],
)
def test_the_verdict_finds(kind: str, operations: list[Operation], final: tuple[UUID, ...]) -> None:
    assert kind in judged(*operations, final=final).kinds


def test_a_message_that_was_read_before_it_was_sent_is_found() -> None:
    assert "a read saw a message before it was sent" in " ".join(judged(read(0.5, ONE)).wrong)


@pytest.mark.parametrize(
    ("operations", "final"),
    [
        ([Operation("delete", 3, 3.1, 0, 200), read(4, ONE, TWO)], ()),
        ([Operation("delete", 3, 3.1, 0, 200)], (ONE, TWO)),
        ([read(3, status=404), read(4, ONE, TWO)], (ONE, TWO)),
        ([Operation("delete", 3, 3.1, 0, 200), Operation("append", 4, 4.1, 0, 200)], ()),
    ],
)
def test_a_session_that_comes_back_is_found(operations: list[Operation], final: tuple[UUID, ...]) -> None:
    assert "resurrected" in judged(*operations, final=final, doomed=True).kinds


def test_a_deleted_session_is_gone_for_good() -> None:
    gone = [read(3, ONE, TWO), Operation("delete", 3, 3.1, 0, 200), read(4, status=404)]
    assert judged(*gone, final=(), doomed=True).wrong == []
