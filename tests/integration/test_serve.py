"""`chat-sessions serve` as a process: from its banner to the last server that it leaves, or not."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import httpx
import pytest
from redis import Redis

from app.embedded import embedded_servers
from app.postgres.schema import upgrade
from tests.databases import migrate, new_database
from tests.integration.processes import (
    command,
    environment,
    eventually,
    nothing_runs_on,
    one_line,
    run,
    serving,
)

SESSIONS = "/api/chat/sessions"

start_servers = partial(embedded_servers, durable=False)


@contextmanager
def open_folder():
    """A folder that the embedded servers' account can reach, unlike tmp_path."""
    with TemporaryDirectory(prefix="chat-serve-") as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture
def folder():
    with open_folder() as opened:
        yield opened


@pytest.fixture(scope="module")
def service():
    """A service with embedded servers, for tests that leave it running."""
    with open_folder() as folder, serving(folder, DATA_DIR=folder / "data") as started:
        yield started
        assert started.end() == 0


@pytest.fixture(scope="module")
def kept_data():
    """What the services of several tests, one after the other, keep: a cluster is made only once."""
    with open_folder() as opened:
        yield opened / "data"


@pytest.fixture
def data_dir(kept_data):
    yield kept_data
    assert eventually(lambda: nothing_runs_on(kept_data))


@pytest.fixture
async def unmigrated_url(servers, anyio_backend):
    async with new_database(servers, "chat_serve") as url:
        yield url


@pytest.fixture
async def migrated_url(unmigrated_url):
    await migrate(unmigrated_url)
    return unmigrated_url


def new_session(client, *contents):
    answer = client.post(SESSIONS, params={"user_id": "an"})
    assert answer.status_code == 201, answer.text
    session = f"{SESSIONS}/{answer.json()['session_id']}"
    assert record(client, session, *contents).status_code == 200
    return session


def record(client, session, *contents):
    messages = [{"role": "user", "content": content} for content in contents]
    return client.post(f"{session}/history", json={"messages": messages})


def contents(client, session):
    answer = client.get(f"{session}/history").raise_for_status()
    return [message["content"] for message in answer.json()["messages"]]


def port_of(url):
    return urlsplit(url).port


def is_open(port):
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


# The banner


def test_the_service_answers_where_the_banner_says(service):
    assert httpx.get(service.banner["docs"]).status_code == 200
    assert "Chat sessions" in httpx.get(service.banner["pages"]).text
    ready = httpx.get(service.banner["health"]).json()
    assert (ready["status"], ready["mode"], ready["embedded"]) == ("pass", "hybrid", True)
    with service.client() as client:
        assert contents(client, new_session(client, "Xin chào")) == ["Xin chào"]
    assert port_of(service.banner["API"]) not in {0, 8000}


def test_the_psql_command_of_the_banner_reads_the_sessions(service):
    count = [*shlex.split(service.value("PostgreSQL")), "-Atc", "select count(*) from analytics.sessions"]
    psql = partial(subprocess.run, count, capture_output=True, text=True, check=True, timeout=30)
    before = int(psql().stdout)

    with service.client() as client:
        new_session(client, "một")

    assert int(psql().stdout) == before + 1


def test_the_redis_cli_command_of_the_banner_leads_to_the_sessions(service):
    arguments = re.fullmatch(r"redis-cli(?: -p (\d+))? -n (\d+)", service.value("Valkey|Redis"))
    with service.client() as client:
        session = new_session(client, "một")

    with Redis(port=int(arguments[1] or 6379), db=int(arguments[2])) as redis:
        assert redis.exists(f"session:{session.rpartition('/')[2]}") == 1


def test_the_banner_names_the_folder_of_the_data(service):
    assert {"lock", "postgres", "valkey"} <= {path.name for path in Path(service.banner["data"]).iterdir()}


def test_a_service_that_is_well_logs_no_error(service):
    with service.client() as client:
        new_session(client, "một")

    assert " INFO " in service.log
    assert not re.search(r" (ERROR|CRITICAL) |Traceback", service.log)


# Refusals


def test_a_second_service_on_the_same_data_is_refused_in_one_line_and_the_first_goes_on(service, folder):
    data_dir = service.banner["data"]

    line = one_line(run("serve", cwd=folder, DATA_DIR=data_dir, PORT=0))

    assert f"process {service.process.pid} has embedded servers running in {data_dir}" in line
    assert httpx.get(service.banner["health"]).json()["status"] == "pass"
    assert (Path(data_dir) / "urls.json").exists()


def test_a_port_that_is_taken_is_refused_in_one_line_before_anything_is_started(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = one_line(run("serve", cwd=folder, DATA_DIR=folder / "data", PORT=port))

    assert f"PORT={port}" in line
    assert list(folder.iterdir()) == []


def test_a_host_that_can_not_be_one_is_refused_in_one_line(folder):
    # Beyond what a name's part may have, where Python raises something else than for a host that is not there.
    host = "a" * 80

    line = one_line(run("serve", cwd=folder, DATA_DIR=folder / "data", PORT=0, HOST=host))

    assert f"HOST={host}" in line
    assert list(folder.iterdir()) == []


def test_a_database_at_another_revision_is_refused_with_the_command_to_run(folder, servers, unmigrated_url):
    urls = {"DATABASE_URL": unmigrated_url, "REDIS_URL": servers.redis_url}

    line = one_line(run("serve", cwd=folder, PORT=0, **urls))
    upgrade(unmigrated_url)
    with serving(folder, **urls) as service:
        ready = httpx.get(service.banner["health"]).json()

    assert "the database is at schema revision none" in line
    assert "run `chat-sessions migrate`" in line
    assert (ready["status"], ready["embedded"]) == ("pass", False)
    assert set(service.banner) == {"pages", "API", "docs", "health"}


def test_a_start_that_is_refused_stops_the_servers_that_it_had_started(data_dir, folder):
    done = run("serve", cwd=folder, DATA_DIR=data_dir, PORT=0, ASSISTANT="nobody")

    assert done.returncode == 1
    assert "postgres" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ASSISTANT is 'nobody'")
    assert "Traceback" not in done.stderr
    assert nothing_runs_on(data_dir)


# Modes


def test_redis_only_without_a_database_starts_no_postgresql(folder):
    data_dir = folder / "data"
    with serving(folder, DATA_DIR=data_dir, REDIS_ONLY_MODE="true") as service, service.client() as client:
        answer = client.get(new_session(client, "một"))
        ready = client.get("/health/ready").json()

    assert answer.headers["X-Session-Source"] == "redis"
    assert (ready["mode"], set(ready["stores"])) == ("redis-only", {"redis"})
    assert not any(name.startswith("PostgreSQL") for name in service.banner)
    assert (data_dir / "valkey").exists()
    assert not (data_dir / "postgres").exists()


def test_without_redis_sessions_no_redis_is_started(folder, migrated_url):
    settings = {"DATABASE_URL": migrated_url, "ENABLE_REDIS_SESSIONS": "false", "DATA_DIR": folder / "data"}
    with serving(folder, **settings) as service, service.client() as client:
        assert contents(client, new_session(client, "một")) == ["một"]
        ready = client.get("/health/ready").json()

    assert (ready["mode"], set(ready["stores"])) == ("postgres", {"postgres"})
    assert not (folder / "data").exists()


# The end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_request_in_flight_and_closes_everything(data_dir, folder, number):
    gate = {"ASSISTANT": "tests.slow_assistant:SlowAssistant", "SLOW_ASSISTANT_DIR": folder}
    with (
        serving(folder, DATA_DIR=data_dir, **gate) as service,
        service.client() as client,
        ThreadPoolExecutor() as threads,
    ):
        ports = [port_of(service.address), port_of(shlex.split(service.value("PostgreSQL"))[-1])]
        session = new_session(client, "một")
        answer = threads.submit(client.post, f"{session}/messages", json={"message": "Điều 5?"})
        assert eventually((folder / "asked").exists)

        service.process.send_signal(number)
        refused = eventually(lambda: not is_open(ports[0]))
        (folder / "answer").touch()

        assert refused
        assert answer.result().status_code == 200
        assert answer.result().json()["assistant_response"] == "Sau khi nghĩ: Điều 5?"
        assert service.process.wait(20) == 0

    assert not any(map(is_open, ports))
    assert nothing_runs_on(data_dir)
    assert not (data_dir / "urls.json").exists()
    assert "database system is shut down" in (data_dir / "postgres.log").read_text()
    assert "Traceback" not in service.log


def test_a_second_start_has_the_data_of_the_first(data_dir, folder):
    with serving(folder, DATA_DIR=data_dir) as first, first.client() as client:
        session = new_session(client, "một", "hai")
        assert first.end() == 0

    with serving(folder, DATA_DIR=data_dir) as second, second.client() as client:
        assert contents(client, session) == ["một", "hai"]
        assert client.get(f"{session}/history").headers["X-Session-Source"] == "redis"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_kill_leaves_no_server_and_loses_nothing_that_was_acknowledged(data_dir, folder):
    with serving(folder, DATA_DIR=data_dir) as first, first.client() as client:
        session = new_session(client, "một")
        assert not nothing_runs_on(data_dir)
        assert first.end(signal.SIGKILL) == -signal.SIGKILL
        assert eventually(lambda: nothing_runs_on(data_dir))
        assert "PostgreSQL can't be reached" in one_line(run("migrate", cwd=folder, DATA_DIR=data_dir))

    with serving(folder, DATA_DIR=data_dir) as second, second.client() as client:
        assert contents(client, session) == ["một"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_a_start_that_waits_for_postgresql(folder, number, code):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        mute.settimeout(20)
        port = mute.getsockname()[1]
        urls = {
            "DATABASE_URL": f"postgresql://chat@127.0.0.1:{port}/chat",
            "REDIS_URL": "redis://127.0.0.1:1",
        }
        with subprocess.Popen(
            command("serve"),
            cwd=folder,
            env=environment(PORT=0, **urls),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            caller, _ = mute.accept()
            with caller:
                process.send_signal(number)
                printed, _ = process.communicate(timeout=20)

    assert (process.returncode, printed) == (code, "")


# Outages


class PrivateServer:
    """A server of one test alone, which may kill it and start it again on its port and data."""

    def __init__(self, start, port_option):
        self._start = start
        self._option = port_option
        self._stack = ExitStack()
        self.url = self.start()

    def start(self, port=0):
        servers = self._stack.enter_context(self._start(**{self._option: port}))
        return servers.database_url or servers.redis_url

    def start_again(self):
        assert self.start(port_of(self.url)) == self.url

    def kill(self, pid):
        os.kill(pid, signal.SIGKILL)
        self._stack.close()

    def close(self):
        self._stack.close()


@pytest.fixture
def postgres(folder):
    server = PrivateServer(partial(start_servers, folder / "own", redis=False), "postgres_port")
    upgrade(server.url)
    yield server
    server.close()


@pytest.fixture
def redis(folder):
    server = PrivateServer(partial(start_servers, folder / "own", postgres=False), "redis_port")
    yield server
    server.close()


def test_redis_may_be_killed_and_come_back_while_the_service_goes_on(folder, migrated_url, redis):
    urls = {"DATABASE_URL": migrated_url, "REDIS_URL": redis.url}
    with (
        serving(folder, **urls) as service,
        service.client() as client,
        Redis.from_url(redis.url) as direct,
    ):
        session = new_session(client, "một")

        redis.kill(direct.info("server")["process_id"])
        recorded = record(client, session, "hai")
        during, ready = client.get(f"{session}/history"), client.get("/health/ready")

        redis.start_again()
        assert eventually(lambda: client.get("/health/ready").json()["status"] == "pass")
        assert record(client, session, "ba").status_code == 200
        assert contents(client, session) == ["một", "hai", "ba"]
        # Redis is believed again once it was well for a while.
        assert eventually(lambda: client.get(session).headers["X-Session-Source"] == "redis")
        assert contents(client, session) == ["một", "hai", "ba"]
        assert service.end() == 0

    assert recorded.status_code == 200
    assert [message["content"] for message in during.json()["messages"]] == ["một", "hai"]
    assert during.headers["X-Session-Source"] == "postgres"
    assert (ready.status_code, ready.json()["status"]) == (200, "warn")
    # Once by the pool that was bound to it, once by the heartbeat's probe, and once more where the machine is so busy
    # that a new Redis is late with an answer: not once a request.
    assert service.log.count("redis is out") in {2, 3}
    assert service.log.count("redis is back") == 1
    changes = re.findall(r"cache (\w+) \(was (\w+)\)", service.log)
    assert [one for one in changes if one[0] != one[1]] == [("off", "on"), ("on", "off")]
    assert "Traceback" not in service.log


def test_postgresql_may_be_killed_and_come_back_while_the_service_goes_on(folder, postgres, servers):
    urls = {"DATABASE_URL": postgres.url, "REDIS_URL": servers.redis_url}
    with serving(folder, **urls) as service, service.client() as client:
        session = new_session(client, "một")

        postgres.kill(postmaster_of(folder))
        refused, cached, ready = (
            record(client, session, "lost"),
            client.get(f"{session}/history"),
            client.get("/health/ready"),
        )

        postgres.start_again()
        assert eventually(lambda: record(client, session, "hai").status_code == 200)
        assert contents(client, session) == ["một", "hai"]
        assert client.get("/health/ready").json()["status"] == "pass"

        postgres.kill(postmaster_of(folder))
        assert service.end() == 0

    assert (refused.status_code, refused.json()["code"]) == (503, "durable_store_unavailable")
    assert cached.status_code == 200
    assert [message["content"] for message in cached.json()["messages"]] == ["một"]
    assert (ready.status_code, ready.json()["status"]) == (200, "warn")
    assert "Traceback" not in service.log


def postmaster_of(folder):
    return int((folder / "own/postgres/data/postmaster.pid").read_text().split()[0])
