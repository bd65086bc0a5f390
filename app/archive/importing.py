"""Out of files into PostgreSQL, in batches, while services serve. Safe to repeat, to stop, and to do twice at once.

A batch is one transaction. What is stored already is known by its ids and left as it is.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from app.archive import parquet
from app.archive.manifest import NAME, Manifest, read_manifest
from app.archive.reading import Bounds, Found, Problem, backup, pair_of
from app.coherence.ports import Piece, Restored
from app.errors import ArchiveRefused, ChatError, Unadoptable, Unavailable

#: Of one transaction: rows stay locked, and others wait, no longer than they would for a large append.
_BATCH_MESSAGES = 1000
_BATCH_SESSIONS = 200
_BATCH_BYTES = 4 * 2**20

Restore = Callable[[Sequence[Piece]], Awaitable[list[Restored | ChatError]]]


@dataclass(slots=True)
class Imported:
    """What an import came to. `sessions_known`: those of which every message was there."""

    sessions_made: int = 0
    sessions_grown: int = 0
    sessions_known: int = 0
    messages_added: int = 0
    messages_known: int = 0
    problems: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Something to import: a month's pair of files, or a backup. `flaws`: why it is not even opened."""

    messages: int | None
    flaws: Callable[[], list[Problem]]
    read: Callable[[Bounds], Iterator[Found | Problem]]


def sources_of(paths: Iterable[Path]) -> list[Source]:
    """What is to be read for these paths. Raises `ArchiveRefused` for one that leads to nothing."""
    return [source for path in paths for source in _sources(path)]


def _sources(path: Path) -> list[Source]:
    if path.is_dir():
        manifest = read_manifest(path)
        if manifest is None:
            raise ArchiveRefused(f"{path} holds no {NAME}", hint="name the folder that `export` wrote")
        if not manifest.complete:
            raise ArchiveRefused(
                f"{path} is half an export",
                hint="end it with the same `export` command, or name the files to import",
            )
        return [_month(path, manifest, name) for name in sorted(manifest.months)]
    if not path.is_file():
        raise ArchiveRefused(
            f"{path} is not there", hint="name a folder of `export`, a file of it, or a backup"
        )
    if not path.parent.name.startswith("month="):
        if path.suffix == ".parquet":
            raise ArchiveRefused(
                f"{path} does not lie in an export", hint="name the folder that `export` wrote"
            )
        return [Source(messages=None, flaws=list, read=lambda bounds: backup(path, bounds))]
    # One file of an export stands for its month: a session is not without its messages.
    folder, name = path.parents[2], path.parent.name.removeprefix("month=")
    manifest = read_manifest(folder)
    if manifest is None or name not in manifest.months:
        raise ArchiveRefused(
            f"{path} is of a month that {folder / NAME} does not name",
            hint="name the folder that `export` wrote",
        )
    return [_month(folder, manifest, name)]


def _month(folder: Path, manifest: Manifest, name: str) -> Source:
    month = manifest.months[name]
    if manifest.format == "parquet":
        parquet.require()

    def flaws() -> list[Problem]:
        found = ((folder / file.path, file.flaw(folder)) for file in month.files)
        return [
            Problem(path=path, line=None, reason=f"{flaw}: its month is left out")
            for path, flaw in found
            if flaw
        ]

    return Source(
        messages=month.messages.rows,
        flaws=flaws,
        read=lambda bounds: pair_of(folder / month.sessions.path, folder / month.messages.path, bounds),
    )


@dataclass(slots=True)
class _Batch:
    found: list[Found] = field(default_factory=list)
    ids: set[UUID] = field(default_factory=set)
    messages: int = 0
    bytes: int = 0

    def has_room_for(self, piece: Piece) -> bool:
        """A session's pieces follow each other in transactions of their own."""
        return (
            piece.session.session_id not in self.ids
            and self.messages + len(piece.messages) <= _BATCH_MESSAGES
            and len(self.found) < _BATCH_SESSIONS
            and self.bytes < _BATCH_BYTES
        )

    def add(self, found: Found) -> None:
        self.found.append(found)
        self.ids.add(found.piece.session.session_id)
        self.messages += len(found.piece.messages)
        self.bytes += sum(len(one.content) + len(one.metadata) for one in found.piece.messages)


async def import_sessions(
    restore: Restore,
    sources: Sequence[Source],
    bounds: Bounds,
    *,
    tell: Callable[[Problem], None],
    advance: Callable[[int], None] = lambda _: None,
) -> Imported:
    """Imports all of it but what `tell` is told of. Memory does not grow with the files.

    Raises `ModeRefused` in any mode but hybrid, `Unavailable` where PostgreSQL is out: what was imported stays.
    """
    done = _Done(tell)
    for source in sources:
        if flaws := await asyncio.to_thread(source.flaws):
            for flaw in flaws:
                done.tell(flaw)
            continue
        batch = _Batch()
        for found in source.read(bounds):
            if isinstance(found, Problem):
                done.tell(found)
                continue
            if not batch.has_room_for(found.piece):
                await _carried_out(restore, batch, done, advance)
                batch = _Batch()
            batch.add(found)
        await _carried_out(restore, batch, done, advance)
    return done.imported


class _Done:
    def __init__(self, tell: Callable[[Problem], None]) -> None:
        self.imported = Imported()
        self._tell = tell

    def tell(self, problem: Problem) -> None:
        self.imported.problems += 1
        self._tell(problem)

    def add(self, piece: Piece, restored: Restored) -> None:
        self.imported.messages_added += restored.added
        self.imported.messages_known += restored.known
        if restored.created:
            self.imported.sessions_made += 1
        elif piece.first_seq == 1:
            self.imported.sessions_known += not restored.added
            self.imported.sessions_grown += bool(restored.added)


async def _carried_out(restore: Restore, batch: _Batch, done: _Done, advance: Callable[[int], None]) -> None:
    if not batch.found:
        return
    outcomes = await restore([found.piece for found in batch.found])
    for found, outcome in zip(batch.found, outcomes, strict=True):
        if isinstance(outcome, Restored):
            done.add(found.piece, outcome)
        elif isinstance(outcome, Unavailable) and not isinstance(outcome, Unadoptable):
            raise outcome
        else:
            done.tell(Problem(path=found.path, line=found.line, reason=str(outcome)))
    advance(batch.messages)
