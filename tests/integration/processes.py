"""Our commands, as somebody calls them from a shell: as processes of their own, or in this one."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from app.cli.main import app

PROJECT = Path(__file__).parents[2]

ANSWER_SECONDS_MAX = 30


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "app", *arguments]


def environment(**settings: object) -> dict[str, str]:
    """Nothing of our own environment but what a program needs to start."""
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(PROJECT),
        "PYTHONUTF8": "1",
        **{name: str(value) for name, value in settings.items()},
    }


def run(*arguments: str, cwd: Path, **settings: object) -> subprocess.CompletedProcess[str]:
    """A command to its end. In `cwd` lies no .env, and no service's data unless DATA_DIR says so."""
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def called(*arguments: str, cwd: Path, **settings: object) -> subprocess.CompletedProcess[str]:
    """The same in this process, where the command's answer is the point: to start one is a second of imports.

    An error that the command does not turn into a line of its own is raised here.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        theirs = environment(**settings)
        for name in set(os.environ) - set(theirs):
            patch.delenv(name)
        for name, value in theirs.items():
            patch.setenv(name, value)
        result = CliRunner().invoke(app, arguments, prog_name="python -m app", catch_exceptions=False)
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The line with which a command was refused."""
    assert (done.returncode, done.stdout) == (1, ""), done
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    return done.stderr.strip()


@dataclass(frozen=True)
class Service:
    """`chat-sessions serve` as it runs; `banner` maps each name that it printed to what stood behind it."""

    process: "subprocess.Popen[str]"
    banner: dict[str, str]
    log_path: Path

    @property
    def address(self) -> str:
        return self.banner["API"].removesuffix("/api/chat")

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def value(self, pattern: str) -> str:
        """What stands in the banner behind the one name that matches."""
        [value] = [value for name, value in self.banner.items() if re.match(pattern, name)]
        return value

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.address, timeout=ANSWER_SECONDS_MAX)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Its exit code; minus the signal where that ended it."""
        self.process.send_signal(number)
        return self.process.wait(ANSWER_SECONDS_MAX)


@contextmanager
def serving(folder: Path, **settings: object) -> Iterator[Service]:
    """A service that has printed its banner; its log and its working folder are in `folder`."""
    log_path = folder / "serve.log"
    with (
        log_path.open("a") as log,
        subprocess.Popen(
            command("serve"),
            cwd=folder,
            env=environment(**{"PORT": 0, **settings}),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        try:
            yield Service(process, read_banner(process, log_path), log_path)
        except BaseException as exc:
            exc.add_note(f"exit code of the service: {process.poll()}, its log:\n{log_path.read_text()}")
            raise
        finally:
            process.terminate()


def read_banner(process: "subprocess.Popen[str]", log_path: Path) -> dict[str, str]:
    """The lines between the second and the third empty one."""
    title = [process.stdout.readline() for _ in range(3)][1]
    assert title == "chat-sessions is serving. Stop it with Ctrl-C.\n", log_path.read_text()
    return dict(re.split(r" {2,}", line.strip(), maxsplit=1) for line in iter(process.stdout.readline, "\n"))


def eventually(probe: Callable[[], Any], seconds_max: float = 20) -> Any:
    """The first true value of `probe`, or its last one when time is up."""
    deadline = time.monotonic() + seconds_max
    while not (value := probe()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return value


def nothing_runs_on(data_dir: Path) -> bool:
    """True once no embedded server holds the folder: each one inherits its lock."""
    with (data_dir / "lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
