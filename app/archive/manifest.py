"""`manifest.json`: what an export holds, and how far it has come. Always whole: it is replaced, never written to."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

from app.chat import LEGACY_MONTH, format_time
from app.errors import ArchiveRefused

NAME = "manifest.json"

#: Of the files, not of the database: a reader refuses what it does not know.
LAYOUT_VERSION = 1

Format = Literal["jsonl", "jsonl.gz", "parquet"]
Table = Literal["sessions", "messages"]


def month_name(month: date) -> str:
    return "legacy" if month == LEGACY_MONTH else f"{month:%Y-%m}"


def path_of(table: Table, month: str, kind: Format) -> str:
    """Where a month's rows are, from the export's folder."""
    return f"{table}/month={month}/{table}.{kind}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which sessions are exported, always whole: of these months, this user, these ids, created in this range."""

    months: tuple[date, ...] = ()
    user_id: str | None = None
    session_ids: tuple[UUID, ...] = ()
    since: datetime | None = None
    until: datetime | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "months": [month_name(month) for month in sorted(self.months)],
            "user_id": self.user_id,
            "sessions": sorted(map(str, self.session_ids)),
            "from": format_time(self.since) if self.since else None,
            "to": format_time(self.until) if self.until else None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A finished file. `path` is from the export's folder."""

    path: str
    rows: int
    bytes: int
    sha256: str

    def flaw(self, folder: Path) -> str | None:
        """Why the file is not the one that was written; None where it is, byte for byte."""
        path = folder / self.path
        try:
            size = path.stat().st_size
            if size != self.bytes:
                return f"has {size} bytes, its manifest says {self.bytes}"
            return None if sha256_of(path) == self.sha256 else "is not what its manifest's sha256 was made of"
        except OSError as exc:
            return f"can't be read: {exc.strerror or exc}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Month:
    """A month of an export, as PostgreSQL had it at `snapshot_at`; `first` and `last` bound its times."""

    month: str
    snapshot_at: str
    first: str | None
    last: str | None
    sessions: File
    messages: File

    @property
    def files(self) -> tuple[File, File]:
        return self.sessions, self.messages

    def is_whole(self, folder: Path) -> bool:
        return not any(file.flaw(folder) for file in self.files)


@dataclass(slots=True, kw_only=True)
class Manifest:
    format: Format
    schema_revision: str
    selection: dict[str, Any]
    months: dict[str, Month] = field(default_factory=dict)
    complete: bool = False

    def write(self, folder: Path) -> None:
        """Replaces the manifest; after a crash the old one or the new one is there."""
        months = [self.months[name] for name in sorted(self.months)]
        text = json.dumps(
            {
                "layout_version": LAYOUT_VERSION,
                "schema_revision": self.schema_revision,
                "format": self.format,
                "selection": self.selection,
                "complete": self.complete,
                "sessions": sum(month.sessions.rows for month in months),
                "messages": sum(month.messages.rows for month in months),
                "first": min((month.first for month in months if month.first), default=None),
                "last": max((month.last for month in months if month.last), default=None),
                "months": [asdict(month) for month in months],
            },
            ensure_ascii=False,
            indent=1,
        )
        half = folder / f"{NAME}.part"
        half.write_text(text + "\n", encoding="utf-8")
        settle(half, folder / NAME)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None where there is none. Raises `ArchiveRefused` for one that can't be followed."""
    try:
        fields = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        raise ArchiveRefused(f"{folder / NAME} can't be read: {exc}") from exc
    try:
        if fields["layout_version"] != LAYOUT_VERSION:
            raise ArchiveRefused(
                f"{folder / NAME} has layout version {fields['layout_version']}, this version reads {LAYOUT_VERSION}",
                hint="use the version of chat-sessions that wrote it",
            )
        return Manifest(
            format=fields["format"],
            schema_revision=fields["schema_revision"],
            selection=fields["selection"],
            months={one["month"]: _month(one, folder) for one in fields["months"]},
            complete=fields["complete"],
        )
    except (KeyError, TypeError, AttributeError) as exc:
        raise ArchiveRefused(f"{folder / NAME} is no manifest of an export: {exc!r}") from exc


def _month(fields: Mapping[str, Any], folder: Path) -> Month:
    files = {table: File(**fields[table]) for table in ("sessions", "messages")}
    root = folder.resolve()
    for file in files.values():
        # A manifest may come from anywhere, and names files that are read.
        if not (folder / file.path).resolve().is_relative_to(root):
            raise ArchiveRefused(f"{folder / NAME} names a file outside of its folder: {file.path}")
    return Month(**{**fields, **files})


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settle(half: Path, whole: Path) -> None:
    """Gives a finished file its name, durably: what has the name is whole."""
    with half.open("rb+") as file:
        os.fsync(file.fileno())
    half.replace(whole)
    folder = os.open(whole.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
