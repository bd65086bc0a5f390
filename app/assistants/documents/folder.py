"""The files that the documents assistant answers from, read once and within bounds.

Only Markdown and text files below one folder are read, in the order of their names. Hidden files and
folders and those of tools are passed over. A link is read where it leads to a file inside the folder, as
in a Kubernetes ConfigMap; a linked folder and a link that leads outside never are. What a bound left out is logged
once, with the reason; a file that can't be read never stops the start.
"""

import codecs
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from app.errors import StartRefused

SUFFIXES = frozenset({".md", ".markdown", ".txt", ".rst"})
FILE_BYTES_MAX = 1024 * 1024
FILES_MAX = 5_000
TOTAL_BYTES_MAX = 64 * 1024 * 1024
#: Files and folders looked at, whatever they are: someone will name `/`.
ENTRIES_MAX = 100_000

_PASSED_OVER = frozenset({"node_modules", "__pycache__", "site-packages"})
_EXAMPLES_MAX = 5

log = logging.getLogger("chat_sessions.assistants")


def own_documentation() -> tuple[Path, tuple[str, ...]]:
    """This project's README and `docs/`: the folder they are in, and those of the two that are there."""
    root = Path(__file__).resolve().parents[3]
    if root.name in {"site-packages", "dist-packages"}:
        # Installed from a wheel, the folder is everybody's: a `docs` in there is another project's.
        return root, ()
    return root, tuple(name for name in ("README.md", "docs") if (root / name).exists())


def read_folder(root: Path, *, only: Sequence[str] | None = None) -> dict[str, str]:
    """The text of each file, by its name relative to `root`; of the entries named by `only`, if given."""
    try:
        with os.scandir(root):
            pass
        inside = root.resolve(strict=True)
    except (OSError, ValueError) as exc:
        raise StartRefused(
            f"DOCUMENTS_DIR is {str(root)!r}, which {_why_not(exc)}",
            hint="name a folder with Markdown or text files that this process may read,"
            " or leave it unset for this project's own documentation",
        ) from exc
    return _Reading(inside).read(only)


def _why_not(exc: OSError | ValueError) -> str:
    match exc:
        case FileNotFoundError():
            return "is not there"
        case NotADirectoryError():
            return "is not a folder"
        case OSError(strerror=str(reason)):
            return f"can't be opened: {reason}"
    return "is not a path"


class _Reading:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.entries = 0
        self.bytes = 0
        self.texts: dict[str, str] = {}
        self.seen: set[Path] = set()
        self.left_out: dict[str, list[str]] = {}
        self.replaced: list[str] = []

    def read(self, only: Sequence[str] | None) -> dict[str, str]:
        tops = sorted(self.root / name for name in only) if only is not None else [self.root]
        for path in (path for top in tops for path in self._files(top)):
            if len(self.texts) >= FILES_MAX:
                self._leave_out(path, f"beyond {FILES_MAX} files")
            elif (raw := self._content(path)) is not None:
                self.texts[self._name(path)] = self._decoded(path, raw)
        self._log()
        return self.texts

    def _files(self, top: Path) -> Iterator[Path]:
        if top.is_file():
            yield top
            return
        for folder, folders, files in os.walk(top, onerror=self._unreadable):
            folders[:] = sorted(name for name in folders if name[0] != "." and name not in _PASSED_OVER)
            self.entries += len(folders) + len(files)
            if self.entries > ENTRIES_MAX:
                self._leave_out(Path(folder), f"beyond {ENTRIES_MAX} entries")
                return
            for name in sorted(files):
                if name[0] != "." and os.path.splitext(name)[1].lower() in SUFFIXES:  # noqa: PTH122 - a Path a file is slow
                    yield Path(folder, name)

    def _unreadable(self, exc: OSError) -> None:
        self._leave_out(Path(str(exc.filename)), exc.strerror or type(exc).__name__)

    def _content(self, path: Path) -> bytes | None:
        try:
            real = path.resolve(strict=True)
            # A pipe or a device would block the start for ever.
            if real in self.seen or not real.is_file():
                return None
            if not real.is_relative_to(self.root):
                self._leave_out(path, "a link out of the folder")
                return None
            self.seen.add(real)
            with real.open("rb") as file:
                raw = file.read(FILE_BYTES_MAX + 1)
        except OSError as exc:
            self._leave_out(path, exc.strerror or type(exc).__name__)
            return None
        if len(raw) > FILE_BYTES_MAX:
            self._leave_out(path, f"larger than {FILE_BYTES_MAX} bytes")
        elif self.bytes + len(raw) > TOTAL_BYTES_MAX:
            self._leave_out(path, f"beyond {TOTAL_BYTES_MAX} bytes in all")
        else:
            self.bytes += len(raw)
            return raw
        return None

    def _decoded(self, path: Path, raw: bytes) -> str:
        is_utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = raw.decode("utf-16" if is_utf16 else "utf-8-sig", errors="replace").replace("\0", "\ufffd")
        if "\ufffd" in text:
            self.replaced.append(self._name(path))
        return text

    def _name(self, path: Path) -> str:
        # A file name may be any bytes; a source must be Unicode text.
        return os.fsencode(path.relative_to(self.root).as_posix()).decode(errors="replace")

    def _leave_out(self, path: Path, reason: str) -> None:
        self.left_out.setdefault(reason, []).append(self._name(path))

    def _log(self) -> None:
        if not self.texts:
            log.warning(
                "no Markdown or text file found in %s: the assistant has nothing to search", self.root
            )
        for reason, names in self.left_out.items():
            log.warning("left out of the documents, %s: %s", reason, listed(names))
        if self.replaced:
            log.warning("not UTF-8, read with replacement characters: %s", listed(self.replaced))


def listed(names: Sequence[str]) -> str:
    """The names, or the first few and how many more there are."""
    more = f", … ({len(names)})" if len(names) > _EXAMPLES_MAX else ""
    return ", ".join(names[:_EXAMPLES_MAX]) + more
