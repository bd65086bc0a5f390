"""The passages in an SQLite FTS5 table in memory, ranked by BM25.

A search is a list of weighted phrases. FTS5 has no weight for a term, but BM25 is a sum over terms: each
phrase is looked up for itself, and the weighted ranks are added up in one statement. Every phrase is quoted
and consists of letters and digits only, so no question can reach FTS5's query syntax.

One connection, one thread at a time: a search takes about a millisecond for a project's documentation.
"""

import sqlite3
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from app.assistants.documents.folding import fold
from app.assistants.documents.passages import Passage
from app.errors import StartRefused

#: A megabyte of headings is hundreds of thousands of passages, each of them with a cost of its own.
PASSAGES_MAX = 200_000

# `porter` lets "sessions" find "session". It leaves Vietnamese alone: no syllable has an English ending.
_SCHEMA = """
CREATE VIRTUAL TABLE passage USING fts5(
    place, heading, body,
    content='',
    tokenize='porter unicode61 remove_diacritics 0'
)
"""
# A word in the passage's own heading says three times as much about it as one in its text; one in the
# file's name or in an outer heading, which many passages share, half as much.
_RANK = "INSERT INTO passage (passage, rank) VALUES ('rank', 'bm25(0.5, 3.0, 1.0)')"
# BM25 gives nearly nothing for a word that half of the passages have; the constant keeps a match better than
# none in a small folder, too. The factor puts passages with more of the question's concepts first, which BM25
# does not when one of the words is rare.
_SEARCH = """
WITH term (phrase, weight, concept) AS (VALUES {values})
SELECT
    passage.rowid,
    sum(term.weight * (0.2 - passage.rank)) * max(1, count(DISTINCT term.concept)) AS score
FROM term CROSS JOIN passage
WHERE passage MATCH term.phrase
GROUP BY passage.rowid
HAVING count(DISTINCT term.concept) >= ?
ORDER BY score DESC, passage.rowid
LIMIT ?
"""


@dataclass(frozen=True, slots=True)
class Term:
    """Words that stand together, folded. Terms with one `concept` are ways to say one thing."""

    words: tuple[str, ...]
    weight: float
    concept: int | None = None


@dataclass(frozen=True, slots=True)
class Hit:
    passage: Passage
    score: float


class PassageIndex:
    """`passages` are those kept, `size` is their number, `is_cut` tells whether there were more."""

    def __init__(self, passages: Iterable[Passage]) -> None:
        remaining = iter(passages)
        self.passages = tuple(islice(remaining, PASSAGES_MAX))
        self.is_cut = next(remaining, None) is not None
        self.size = len(self.passages)
        self._lock = threading.Lock()
        self._database = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        try:
            self._fill()
        except BaseException as exc:
            self._database.close()
            if isinstance(exc, sqlite3.OperationalError):
                raise StartRefused(
                    f"ASSISTANT is 'documents', and SQLite refused the index: {exc}",
                    hint="it needs a Python whose sqlite3 has FTS5",
                ) from exc
            raise

    def _fill(self) -> None:
        self._database.execute(_SCHEMA)
        self._database.execute(_RANK)
        self._database.execute("BEGIN")
        self._database.executemany(
            "INSERT INTO passage (rowid, place, heading, body) VALUES (?, ?, ?, ?)",
            (
                (
                    row,
                    fold(" ".join((passage.file, *passage.headings[:-1]))),
                    fold(" ".join(passage.headings[-1:])),
                    fold(passage.text),
                )
                for row, passage in enumerate(self.passages)
            ),
        )
        self._database.execute("COMMIT")

    def search(self, terms: Sequence[Term], *, concepts_min: int, limit: int) -> list[Hit]:
        """The best passages that have at least `concepts_min` different concepts, best first."""
        if not terms:
            return []
        values = ", ".join(["(?, ?, ?)"] * len(terms))
        parameters: list[object] = []
        for term in terms:
            parameters += [f'"{" ".join(term.words)}"', term.weight, term.concept]
        with self._lock:
            rows = self._database.execute(
                _SEARCH.format(values=values), [*parameters, concepts_min, limit]
            ).fetchall()
        return [Hit(self.passages[row], score) for row, score in rows]

    def close(self) -> None:
        with self._lock:
            self._database.close()
