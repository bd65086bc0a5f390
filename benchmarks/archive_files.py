"""Export and import: rows a second and memory, against a plain COPY of the same rows as the limit.

python benchmarks/archive_files.py --database-url URL [--rounds N]   # of a filled archive: see growth/README.md
"""

import argparse
import asyncio
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import asyncpg

_COPY = """
SELECT session_id, seq, message_id, role, content, created_at, processing_time_ms, source_count, metadata,
       request_digest, request_size
FROM chat.chat_messages ORDER BY session_id, seq
"""


async def _copied(url: str) -> int:
    """Hypothesis: PostgreSQL's own reading, sorting and sending of the same rows is most of an export.

    The rows are thrown away as they arrive: nothing that makes files of them can be quicker.
    """

    async def drop(_data: bytes) -> None: ...

    conn = await asyncpg.connect(url)
    try:
        done = await conn.copy_from_query(_COPY, output=drop, format="csv", timeout=24 * 3600)
    finally:
        await conn.close()
    return int(done.split()[1])


def _exported(url: str, kind: str) -> float:
    """The peak of the command's resident memory, MiB."""
    with tempfile.TemporaryDirectory(prefix="archive-files-") as folder:
        words = [sys.executable, "-m", "app", "export", str(Path(folder) / "out"), "--format", kind]
        environment = {**os.environ, "DATABASE_URL": url}
        with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"the export as {kind} failed")
    return usage.ru_maxrss / 1024


def _timed(call: Callable[[], float]) -> tuple[float, float]:
    began = time.perf_counter()
    value = call()
    return time.perf_counter() - began, value


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--database-url", required=True, metavar="URL")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    wanted = parser.parse_args()
    url = wanted.database_url
    cases: dict[str, Callable[[], float]] = {
        "plain COPY": lambda: asyncio.run(_copied(url)),
        **{kind: lambda kind=kind: _exported(url, kind) for kind in ("parquet", "jsonl", "jsonl.gz")},
    }
    rows = asyncio.run(_copied(url))
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    memory: dict[str, float] = {}
    for number in range(wanted.rounds):
        # What is compared takes turns, the second time backwards.
        for name in list(cases) if number % 2 == 0 else reversed(list(cases)):
            took, value = _timed(cases[name])
            seconds[name].append(took)
            memory[name] = max(value, memory.get(name, 0))
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    memory["plain COPY"] = own
    print(
        f"{rows:,} messages, {wanted.rounds} rounds, load {os.getloadavg()[0]:.1f}; commands with their start"
    )
    limit = seconds["plain COPY"]
    for name, its in seconds.items():
        ratio = statistics.median(one / least for one, least in zip(its, limit, strict=True))
        print(
            f"{name:12} {rows / statistics.median(its):10,.0f} rows/s   {ratio:5.2f} x COPY   {memory[name]:6.0f} MiB"
        )


if __name__ == "__main__":
    main()
