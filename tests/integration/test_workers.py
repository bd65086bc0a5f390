"""`chat-sessions serve --workers N` as processes: one service to its callers, whatever happens to one of them."""

import os
import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from app.cli.workers import next_pause
from app.coherence.ports import PROTOCOL
from app.postgres.statements import SEED_STATE
from tests.databases import migrate, new_database
from tests.integration.processes import eventually, nothing_runs_on, one_line, run, serving

SESSIONS = "/api/chat/sessions"

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(os.name == "nt", reason="Windows can't share a port between processes"),
]


@pytest.fixture
def folder():
    # The embedded servers' account can reach it, unlike tmp_path.
    with TemporaryDirectory(prefix="chat-workers-") as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture(scope="module")
async def urls(servers, anyio_backend):
    """A database of this module's own; and Redis without what other tests have left."""
    with Redis.from_url(servers.redis_url, db=1) as redis:
        redis.flushdb()
    async with new_database(servers, "chat_workers") as url:
        await migrate(url)
        yield {"DATABASE_URL": url, "REDIS_URL": servers.redis_url}


@pytest.fixture(scope="module")
def service(urls):
    """Two workers, for tests that leave two workers running."""
    with TemporaryDirectory() as name, serving(Path(name), WORKERS=2, **urls) as started:
        yield started


def pids(service):
    """The process of each worker, as the log says it."""
    return {
        int(number): int(pid)
        for number, pid in re.findall(r"worker (\d) serves as process (\d+)", service.log)
    }


@contextmanager
def stopped(pid):
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def client_of(service, number):
    """A connection that one of two workers has accepted: the other was stopped while it was made."""
    [other] = [pid for other, pid in pids(service).items() if other != number]
    with service.client() as client:
        with stopped(other):
            client.get("/health/live").raise_for_status()
        yield client


def new_session(client, *contents):
    answer = client.post(SESSIONS, params={"user_id": "an"}).raise_for_status()
    session = f"{SESSIONS}/{answer.json()['session_id']}"
    for content in contents:
        record(client, session, content).raise_for_status()
    return session


def record(client, session, content):
    return client.post(f"{session}/history", json={"messages": [{"role": "user", "content": content}]})


def contents(client, session):
    answer = client.get(f"{session}/history").raise_for_status()
    return [message["content"] for message in answer.json()["messages"]]


def scraped(client, name):
    """The samples of one metric by their worker."""
    families = text_string_to_metric_families(client.get("/metrics").raise_for_status().text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return {sample.labels["worker"]: sample.value for sample in samples}


def lives(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def is_free(address):
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", urlsplit(address).port)) != 0


# One service


def test_both_workers_answer_and_each_is_seen_through_the_other(service):
    with client_of(service, 1) as first, client_of(service, 2) as second:
        session = new_session(first, "một")
        before = scraped(first, "chat_cache_hits_total")
        for _ in range(3):
            contents(first, session)
        contents(second, session)
        after = [scraped(client, "chat_cache_hits_total") for client in (first, second)]
        up = scraped(first, "chat_worker_up")

    assert service.banner["workers"] == "2"
    processes = {service.process.pid, *pids(service).values()}
    assert len(processes) == 3
    # A Ctrl-C is for the parent alone.
    assert {os.getpgid(pid) for pid in pids(service).values()} == set(pids(service).values())
    assert after == [{"1": before["1"] + 3, "2": before["2"] + 1}] * 2
    assert up == {"1": 1, "2": 1}


def test_what_one_worker_has_acknowledged_the_other_reads_at_once(service):
    with client_of(service, 1) as first, client_of(service, 2) as second:
        session = new_session(first)
        for turn in range(50):
            writer, reader = (first, second) if turn % 2 else (second, first)
            record(writer, session, str(turn)).raise_for_status()
            assert contents(reader, session) == [str(one) for one in range(turn + 1)]
        first.delete(session).raise_for_status()
        assert second.get(f"{session}/history").status_code == 404


def test_a_worker_does_not_take_all_callers_that_wait(service):
    """Each would stay with it for as long as it is connected, and the other worker would have nothing to do."""
    one, other = pids(service).values()
    port = urlsplit(service.address).port
    with service.client() as client, ExitStack() as stack:
        session = new_session(client, "một")
        before = scraped(client, "chat_cache_hits_total")
        callers = [stack.enter_context(closing(HTTPConnection("127.0.0.1", port))) for _ in range(128)]
        with stopped(one):
            with stopped(other):
                for caller in callers:
                    caller.connect()
                os.kill(one, signal.SIGCONT)
                for _ in range(10):
                    read_history(callers[0], session)
            for caller in callers[1:]:
                read_history(caller, session)
        after = scraped(client, "chat_cache_hits_total")

    assert min(after[worker] - before[worker] for worker in before) >= 16


def read_history(caller, session):
    caller.request("GET", f"{session}/history")
    answer = caller.getresponse()
    assert (answer.status, b"messages" in answer.read()) == (200, True)


def test_a_worker_that_hangs_does_not_take_the_others_metrics_with_it(service):
    with client_of(service, 1) as first, stopped(pids(service)[2]):
        up = scraped(first, "chat_worker_up")

    assert up == {"1": 1, "2": 0}


def test_a_killed_worker_is_replaced_and_nothing_acknowledged_is_lost(service):
    before = pids(service)
    acknowledged, failed = [], []
    with client_of(service, 1) as first, service.client() as any_of_them:
        session = new_session(first)
        for number in range(40):
            client = first if number < 20 else any_of_them
            try:
                record(client, session, str(number)).raise_for_status()
            except httpx.TransportError:
                failed.append(number)
            else:
                acknowledged.append(str(number))
            if number == 10:
                os.kill(before[1], signal.SIGKILL)

        assert eventually(lambda: pids(service)[1] != before[1])
        with client_of(service, 1) as replaced, client_of(service, 2) as other:
            assert contents(replaced, session) == contents(other, session)
            assert set(acknowledged) <= set(contents(replaced, session))

    assert f"worker 1 (process {before[1]}) ended: SIGKILL; another is started in" in service.log
    assert pids(service)[2] == before[2]
    assert len(failed) <= 1
    # It joined an epoch: nobody has begun another.
    assert len(re.findall(r"cache \w+ \(was \w+\)", service.log)) == 1


def test_the_pause_before_a_worker_is_replaced_grows_while_none_lasts():
    pauses = [0.0]
    for _ in range(9):
        pauses.append(next_pause(pauses[-1], lasted_seconds=1))

    assert pauses == [0, 0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert next_pause(30, lasted_seconds=60) == 0


# Starts


def test_a_start_that_the_workers_refuse_is_one_line(folder, urls):
    refused = run(
        "serve", "--workers", "2", cwd=folder, PORT=0, ASSISTANT="nobody", LOG_LEVEL="error", **urls
    )

    assert one_line(refused).startswith("error: ASSISTANT is 'nobody'")


async def test_the_mode_is_settled_once_and_whoever_replaces_a_worker_takes_it_as_it_is(folder, servers):
    """Each would else be refused: it asks for another mode than the database is in, and its siblings serve."""
    async with new_database(servers, "chat_workers_mode") as url:
        await migrate(url)
        conn = await asyncpg.connect(url)
        await conn.execute(SEED_STATE, PROTOCOL, "0123456789abcdef", "redis-only", "off", None)
        databases = {"DATABASE_URL": url, "REDIS_DB_SESSIONS": 5, "REDIS_DB_AUX": 6}
        with serving(
            folder, REDIS_URL=servers.redis_url, REDIS_ONLY_MODE="false", WORKERS=2, **databases
        ) as service:
            settled = await conn.fetchval("SELECT mode FROM chat.cache_state")
            await conn.execute("UPDATE chat.cache_state SET mode = 'redis-only', epoch = '00000000deadbeef'")
            before = pids(service)
            os.kill(before[2], signal.SIGKILL)

            assert eventually(lambda: pids(service)[2] != before[2]), service.log
            assert service.end() == 0
        await conn.close()

    assert settled in {"draining", "hybrid"}
    assert service.log.index("worker 1 serves") < service.log.index(" worker-2 ")


# Ends


@contextmanager
def in_flight(folder, service):
    """A question to which the assistant has no answer yet; gives what the caller will be answered."""
    with service.client() as client, ThreadPoolExecutor() as threads:
        session = new_session(client)
        answer = threads.submit(client.post, f"{session}/messages", json={"message": "Điều 5?"})
        assert eventually((folder / "asked").exists)
        yield answer


@pytest.fixture
def slow(folder):
    return {"ASSISTANT": "tests.slow_assistant:SlowAssistant", "SLOW_ASSISTANT_DIR": folder, "WORKERS": 2}


def test_a_signal_finishes_the_request_in_flight_and_ends_every_process(folder, slow):
    data_dir = folder / "data"
    with serving(folder, DATA_DIR=data_dir, **slow) as service, in_flight(folder, service) as answer:
        service.process.send_signal(signal.SIGTERM)
        refused = eventually(lambda: is_free(service.address))
        (folder / "answer").touch()

        assert refused
        assert answer.result().status_code == 200
        assert service.process.wait(20) == 0

    assert not any(map(lives, pids(service).values()))
    assert nothing_runs_on(data_dir)
    assert "database system is shut down" in (data_dir / "postgres.log").read_text()
    assert not re.search(r" (ERROR|CRITICAL) |Traceback", service.log)


def test_a_second_signal_does_not_wait_for_the_request_in_flight(folder, slow, urls):
    with serving(folder, **slow, **urls) as service, in_flight(folder, service) as answer:
        service.process.send_signal(signal.SIGINT)
        assert eventually(lambda: is_free(service.address))
        assert service.process.poll() is None
        service.process.send_signal(signal.SIGINT)

        assert service.process.wait(5) == 0
        assert isinstance(answer.exception(), httpx.TransportError)

    assert not any(map(lives, pids(service).values()))


def test_no_worker_outlives_its_parent(service):
    # The last one: it ends the service of the tests above.
    assert service.end(signal.SIGKILL) == -signal.SIGKILL

    assert eventually(lambda: not any(map(lives, pids(service).values())), seconds_max=5)
    assert is_free(service.address)
