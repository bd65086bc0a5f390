"""From nothing to the first answered message, and what an idle worker weighs.

Hypothesis: what a newcomer waits for is the package index; our own start (a database cluster, migrations,
both servers) is a few seconds once, and a second start is what importing and connecting takes. The goals
are those that the README names. The control is the second start: the same program without initdb,
migrations and cold files.

A fresh clone in a temporary folder, an environment of PATH, an empty HOME and pip's own configuration, an
empty pip cache, `make run`. "Answered" is the 200 to a message posted over HTTP, which both stores then
hold. Everything is stopped and removed at the end. Needs Linux, for /proc.

    python benchmarks/start.py [--working-tree]
"""

import argparse
import http.client
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

PROJECT = Path(__file__).resolve().parents[1]
AGAIN = 3
DEADLINE_SECONDS = 900
MESSAGES_BEFORE_IDLE = 100
IDLE_SECONDS = 5

#: Where packages come from and how this machine trusts it: pip's business, and no part of our own start.
_KEPT = ("PIP_", "SSL_CERT_", "REQUESTS_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


@dataclass(frozen=True, kw_only=True)
class Started:
    """A service that has answered its first message. Times are seconds since boot."""

    asked: float
    launched: float
    answered: float
    pid: int
    port: int

    @property
    def seconds(self) -> float:
        return self.answered - self.asked

    @property
    def own_seconds(self) -> float:
        return self.answered - self.launched


@dataclass(frozen=True, kw_only=True)
class Measure:
    name: str
    got: float
    unit: str
    at_most: float | None = None
    note: str = ""

    @property
    def met(self) -> bool:
        return self.at_most is None or self.got <= self.at_most

    def row(self) -> tuple[str, str, str]:
        goal = "" if self.at_most is None else f"<= {self.at_most:g} {self.unit}"
        return self.name, f"{self.got:.1f} {self.unit}{self.note}", goal if self.met else f"{goal}  MISSED"


def now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def clean_environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name.upper().startswith(_KEPT)}
    configs = (Path.home() / ".config/pip/pip.conf", Path.home() / ".pip/pip.conf")
    for config in configs:
        if config.exists():
            kept.setdefault("PIP_CONFIG_FILE", str(config))
    return {
        **kept,
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(home),
        "PIP_CACHE_DIR": str(home / "pip-cache"),
        "PIP_NO_CACHE_DIR": "1",
    }


def clone(to: Path, *, working_tree: bool) -> None:
    if not working_tree:
        subprocess.run(["git", "clone", "--quiet", "--no-local", str(PROJECT), str(to)], check=True)
        return
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (PROJECT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, to / name)


@contextmanager
def service(checkout: Path, data_dir: Path, environment: dict[str, str]) -> Iterator[Started]:
    """`make run`, until it has answered a message; stopped by SIGTERM, as an operator would."""
    port = free_port()
    log = checkout.with_name("make.log")
    asked = now()
    with log.open("w") as output:
        make = subprocess.Popen(
            ["make", "run"],
            cwd=checkout,
            env={**environment, "PORT": str(port), "DATA_DIR": str(data_dir)},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        pid, launched = wait_for_service(make, log)
        yield Started(
            asked=asked, launched=launched, answered=first_answer(make, port, log), pid=pid, port=port
        )
        os.kill(pid, signal.SIGTERM)
        make.wait(30)
    finally:
        # Where all went well there is nobody left. Else: in order, and only then by force.
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(make.pid, number)
                make.wait(30)
        # As root and below a folder that is closed to others, the servers keep their data elsewhere.
        link = data_dir / "servers"
        if link.is_symlink() and checkout.parent not in link.resolve().parents:
            shutil.rmtree(link.resolve(), ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_service(make: "subprocess.Popen[bytes]", log: Path) -> tuple[int, float]:
    """The pid of `chat-sessions serve` below this make, and when that process began."""
    for _ in polled(make, log, every_seconds=0.05):
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                command = stat.with_name("cmdline").read_text().replace("\0", " ").strip()
                if int(fields[1]) == make.pid and command.endswith("chat-sessions serve"):
                    return int(stat.parent.name), int(fields[19]) / os.sysconf("SC_CLK_TCK")
    raise AssertionError


def first_answer(make: "subprocess.Popen[bytes]", port: int, log: Path) -> float:
    for _ in polled(make, log, every_seconds=0.01):
        # The port listens before there is anybody to answer: the request waits there for its answer.
        with suppress(ConnectionRefusedError):
            say(port, new_session(port))
            return now()
    raise AssertionError


def polled(make: "subprocess.Popen[bytes]", log: Path, *, every_seconds: float) -> Iterator[None]:
    deadline = now() + DEADLINE_SECONDS
    while make.poll() is None and now() < deadline:
        yield
        time.sleep(every_seconds)
    end = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    raise SystemExit(f"`make run` did not come up; the end of what it said:\n{end}")


def new_session(port: int) -> str:
    return str(call(port, "POST", "/api/chat/sessions?user_id=user123", 201)["session_id"])


def say(port: int, session_id: str) -> None:
    body = {"message": "How long do sessions live?"}
    call(port, "POST", f"/api/chat/sessions/{session_id}/messages", 200, body)


def call(port: int, method: str, path: str, expected: int, body: object = None) -> dict[str, object]:
    conn = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        text = None if body is None else json.dumps(body)
        conn.request(method, path, text, {"Content-Type": "application/json"})
        answer = conn.getresponse()
        content = answer.read()
        if answer.status != expected:
            raise SystemExit(f"{method} {path} answered {answer.status}: {content.decode(errors='replace')}")
        found: dict[str, object] = json.loads(content)
        return found
    finally:
        conn.close()


def idle_mib(started: Started) -> dict[str, float]:
    """Resident and proportional memory of the worker after some work and `IDLE_SECONDS` of rest."""
    session_id = new_session(started.port)
    for _ in range(MESSAGES_BEFORE_IDLE):
        say(started.port, session_id)
        call(started.port, "GET", f"/api/chat/sessions/{session_id}/history", 200)
    time.sleep(IDLE_SECONDS)
    fields = (line.split() for line in Path(f"/proc/{started.pid}/smaps_rollup").read_text().splitlines()[1:])
    return {name.rstrip(":"): int(kib) / 1024 for name, kib, _ in fields}


def measure(folder: Path, *, working_tree: bool) -> list[Measure]:
    checkout, home = folder / "checkout", folder / "home"
    home.mkdir()
    environment = clean_environment(home)
    began = now()
    clone(checkout, working_tree=working_tree)
    cloned = now()
    with service(checkout, folder / "data", environment) as first:
        memory = idle_mib(first)
    second = []
    for _ in range(AGAIN):
        with service(checkout, folder / "data", environment) as started:
            second.append(started.seconds)
    empty = []
    for index in range(AGAIN):
        with service(checkout, folder / f"data-{index}", environment) as started:
            empty.append(started.own_seconds)
    return [
        Measure(name="fresh clone to first answer", got=first.answered - began, unit="s", at_most=90),
        Measure(name="  cloning", got=cloned - began, unit="s"),
        Measure(name="  installing", got=first.launched - first.asked, unit="s"),
        Measure(name="  own start", got=first.own_seconds, unit="s", at_most=5),
        Measure(name="own start, empty data again", unit="s", at_most=5, **spread(empty)),
        Measure(name="second start", unit="s", at_most=2.5, **spread(second)),
        Measure(name="idle worker, resident", got=memory["Rss"], unit="MiB", at_most=120),
        Measure(name="  its own share (PSS)", got=memory["Pss"], unit="MiB"),
    ]


def spread(values: list[float]) -> dict[str, float | str]:
    return {
        "got": statistics.median(values),
        "note": f"  ({min(values):.1f} to {max(values):.1f}, {len(values)} times)",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--working-tree", action="store_true", help="copy what is not ignored here instead of cloning HEAD"
    )
    wanted = parser.parse_args()
    if sys.platform != "linux":
        raise SystemExit("this needs Linux: it reads times and memory from /proc")
    # An end by SIGTERM removes everything, too.
    signal.signal(signal.SIGTERM, lambda _signal, _frame: sys.exit(1))
    print(
        f"machine  {os.cpu_count()} cores, {platform.machine()}, {platform.system()} {platform.release()}, "
        f"load {os.getloadavg()[0]:.1f} before; python {platform.python_version()}\n"
    )
    with TemporaryDirectory(prefix="chat-start-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o711)  # the account that the servers run as must pass
        measures = measure(folder, working_tree=wanted.working_tree)
    rows = [("measure", "got", "goal"), *(one.row() for one in measures)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(" | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    if not all(one.met for one in measures):
        sys.exit(1)


if __name__ == "__main__":
    main()
