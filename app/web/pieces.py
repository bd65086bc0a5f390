"""What a page has many of: the rows of a list, the messages of a transcript.

`templates/pieces.html` has each as a format. To fill 50 takes a tenth of the time that rendering 50 takes, which was more
than the queries of the page.
"""

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import quote
from uuid import UUID

from markupsafe import Markup

from app.chat import ROLES, ChatSession, format_time
from app.store import History
from app.web.languages import Language

#: What is longer is cut, with a link to all of it: 50 messages of 256 KiB would be a page of 12 MiB.
CHARACTERS_SHOWN = 8_000

#: Of a question: a line shows some thirty of them.
TITLE_CHARACTERS = 80

_NAMED = re.compile(r"%\((\w+)\)s")


class Format:
    """Markup with `%(name)s` where something is filled in."""

    def __init__(self, markup: str) -> None:
        self._names = _NAMED.findall(markup)
        self._format = _NAMED.sub("%s", markup)

    def each(self, **columns: Sequence[str]) -> Iterable[str]:
        """One for each place of the columns, which are markup. Raises `ValueError` where one is shorter than another."""
        return map(self._format.__mod__, zip(*(columns[name] for name in self._names), strict=True))

    def one(self, **values: str) -> str:
        return self._format % tuple(values[name] for name in self._names)


class Pieces:
    """Them in one language: `formats` has those of `pieces.html` as attributes. What comes out is markup, whatever was in
    what went in.
    """

    def __init__(self, formats: object, language: Language) -> None:
        self._language = language
        self._roles = {role: language.text(f"role.{role}") for role in ROLES}

        def format_of(name: str) -> Format:
            return Format(str(getattr(formats, name)))

        self._session, self._past, self._title, self._began = map(
            format_of, ("session", "past", "title", "began")
        )
        self._message, self._took, self._rest, self._sources, self._source = map(
            format_of, ("message", "took", "rest", "sources", "source")
        )

    def sessions(self, found: Sequence[ChatSession], titles: Mapping[UUID, str]) -> Markup:
        """Rows of a table."""
        active = [format_time(one.last_activity) for one in found]
        rows = self._session.each(
            **self._columns(found, titles),
            active=active,
            active_text=[*map(moment_text, active)],
            user=escaped([one.user_id for one in found]),
        )
        return Markup("".join(rows))  # noqa: S704 - escaped above

    def past(self, found: Sequence[ChatSession], titles: Mapping[UUID, str], current: UUID | None) -> Markup:
        """Links of a list. `current` is the session that one is in."""
        lines = self._past.each(
            **self._columns(found, titles),
            current=[' aria-current="page"' if one.session_id == current else "" for one in found],
        )
        return Markup("".join(lines))  # noqa: S704 - escaped above

    def _columns(self, found: Sequence[ChatSession], titles: Mapping[UUID, str]) -> dict[str, list[str]]:
        """What a session goes by is its title, or else when it began."""
        created = [format_time(one.created_at) for one in found]
        began = [self._began.one(created=told, created_text=moment_text(told)) for told in created]
        asked = escaped([titles.get(one.session_id, "").strip() for one in found])
        return {
            "id": [str(one.session_id) for one in found],
            "user_in_address": [_in_address(one.user_id) for one in found],
            "messages": [self._language.number(one.message_count) for one in found],
            "began": began,
            "title": [
                self._title.one(text=text) if text else when for text, when in zip(asked, began, strict=True)
            ],
            "began_too": [f" · {when}" if text else "" for text, when in zip(asked, began, strict=True)],
        }

    def messages(
        self, history: History, session_id: UUID, *, marked: int | None = None, whole: int | None = None
    ) -> Markup:
        """The one of seq `marked` stands out; that of seq `whole` is shown whatever its length."""
        found = json.loads(b"[%b]" % history.body)
        seqs = [str(one["seq"]) for one in found]
        contents = [one["content"] for one in found]
        metadata = [one["metadata"] for one in found]
        written = escaped([one["timestamp"] for one in found])
        # What nearly all of them have not.
        marks, rests = [""] * len(found), [""] * len(found)
        if marked is not None and 0 <= (index := marked - history.first_seq) < len(found):
            marks[index] = " message-marked"
        for index, content in enumerate(contents):
            if len(content) > CHARACTERS_SHOWN and found[index]["seq"] != whole:
                contents[index] = content[:CHARACTERS_SHOWN]
                rests[index] = self._rest.one(
                    id=str(session_id), seq=seqs[index], characters=self._language.number(len(content))
                )
        articles = self._message.each(
            id=[str(session_id)] * len(found),
            seq=seqs,
            role=[one["role"] for one in found],
            role_text=[self._roles[one["role"]] for one in found],
            marked=marks,
            written=written,
            written_text=[*map(moment_text, written)],
            took=[self._took_of(one) if one else "" for one in metadata],
            text=escaped(contents),
            rest=rests,
            sources=[self._sources_of(one) if one else "" for one in metadata],
        )
        return Markup("".join(articles))  # noqa: S704 - escaped above

    def _took_of(self, metadata: Mapping[str, Any]) -> str:
        took = metadata.get("processing_time_ms")
        # True is an int of Python's.
        if not isinstance(took, int | float) or isinstance(took, bool):
            return ""
        return self._took.one(time=self._language.duration(took / 1000))

    def _sources_of(self, metadata: Mapping[str, Any]) -> str:
        sources = metadata.get("sources")
        if not sources or not isinstance(sources, list):
            return ""
        told = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in sources]
        return self._sources.one(
            count=str(len(told)), sources="".join(self._source.each(source=[*map(html.escape, told)]))
        )


def escaped(texts: Sequence[str]) -> Sequence[str]:
    """Each of them as text of HTML. In one go: by itself a short one takes longer to hand over than to look through."""
    found = html.escape("\0".join(texts)).split("\0")
    # Neither store takes a NUL, but somebody else may have written to Redis.
    return found if len(found) == len(texts) else [html.escape(text) for text in texts]


@lru_cache(maxsize=1024)
def _in_address(text: str) -> str:
    return quote(text, safe="")


def moment_text(told: str) -> str:
    """What `format_time` has written, as it is read."""
    return f"{told[:10]} {told[11:19]} UTC"
