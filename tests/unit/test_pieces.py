"""What pages repeat: each value in its own place, and none of them ever markup."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

import pytest

from app.chat import ChatSession, utc_now
from app.store import History
from app.web.frame import _PIECES
from app.web.languages import LANGUAGES
from app.web.pieces import CHARACTERS_SHOWN, escaped

HOSTILE = "\"'><script>alert(1)</script>&amp;%(text)s%s%"
SESSION = ChatSession(
    session_id=UUID("01890000-0000-7000-8000-000000000000"),
    user_id=HOSTILE,
    created_at=utc_now(),
    last_activity=utc_now(),
    message_count=5,
)


class Elements(HTMLParser):
    def __init__(self, markup):
        super().__init__()
        self.tags, self.values, self.words = set(), [], []
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.values += [value for _, value in attrs]

    def handle_data(self, data):
        self.words.append(data)


def history_of(*messages):
    lines = [
        json.dumps(
            {
                "seq": seq,
                "role": "user",
                "content": "",
                "timestamp": "2025-11-14T10:30:00.000Z",
                "metadata": {},
            }
            | message
        )
        for seq, message in enumerate(messages, 1)
    ]
    return History(session=SESSION, first_seq=1, body=",\n".join(lines).encode(), source="redis")


@pytest.fixture(params=LANGUAGES)
def pieces(request):
    return _PIECES[request.param]


def test_nothing_that_a_store_holds_of_a_message_is_markup(pieces):
    metadata = {"sources": [HOSTILE, {"a": HOSTILE}], "processing_time_ms": 1200}
    shown = Elements(
        pieces.messages(
            history_of({"content": HOSTILE, "timestamp": HOSTILE, "metadata": metadata}), SESSION.session_id
        )
    )

    assert "script" not in shown.tags
    assert shown.words.count(HOSTILE) == 2
    assert json.dumps({"a": HOSTILE}) in shown.words
    assert HOSTILE in shown.values


def test_nothing_that_a_store_holds_of_a_session_is_markup(pieces):
    titles = {SESSION.session_id: HOSTILE}
    for markup in (
        pieces.sessions([SESSION], titles),
        pieces.past([SESSION], titles, None),
        pieces.past([SESSION], {}, SESSION.session_id),
    ):
        shown = Elements(markup)
        assert "script" not in shown.tags
        assert HOSTILE in [
            *shown.words,
            *(parse_qs(urlsplit(link).query)["user_id"][0] for link in shown.values if link.startswith("/?")),
        ]


def test_a_session_goes_by_what_was_asked_first_and_else_by_when_it_began(pieces):
    other = replace(SESSION, session_id=UUID("01890000-0000-7000-8000-000000000001"))
    for markup in (
        pieces.sessions([SESSION, other], {other.session_id: " Một câu hỏi? "}),
        pieces.past([SESSION, other], {other.session_id: " Một câu hỏi? "}, None),
    ):
        untitled, titled, _ = re.split("</tr>|</li>", markup)
        assert "Một câu hỏi?" not in untitled
        assert re.search('<a [^>]*0000"( title="[^"]*")?><time', untitled)
        assert ">Một câu hỏi?<" in titled
        assert "<time" in titled


def test_the_session_that_one_is_in_is_marked_among_the_past_ones(pieces):
    other = replace(SESSION, session_id=UUID("01890000-0000-7000-8000-000000000001"))
    first, second, _ = pieces.past([SESSION, other], {}, other.session_id).split("</li>")

    assert "aria-current" not in first
    assert "aria-current" in second


def test_each_text_stands_in_its_own_message(pieces):
    history = history_of(*({"content": f"text {seq}"} for seq in range(1, 6)))
    articles = pieces.messages(history, SESSION.session_id, marked=4).split("</article>")

    for seq, article in enumerate(articles[:-1], 1):
        assert f'id="m-{seq}"' in article
        assert f">text {seq}<" in article
        assert ("message-marked" in article) == (seq == 4)


@pytest.mark.parametrize("marked", [0, 6])
def test_a_message_that_is_not_there_marks_none(pieces, marked):
    assert "message-marked" not in pieces.messages(history_of(*[{}] * 5), SESSION.session_id, marked=marked)


def test_a_long_message_is_cut_unless_all_of_it_was_asked(pieces):
    history = history_of({}, {"content": "a" * CHARACTERS_SHOWN + "b"}, {"content": "a" * CHARACTERS_SHOWN})

    cut = pieces.messages(history, SESSION.session_id)
    assert "ab" not in cut
    assert cut.count("whole=") == 1
    assert "?at=2&amp;whole=2#m-2" in cut
    whole = pieces.messages(history, SESSION.session_id, whole=2)
    assert "ab" in whole
    assert "whole=" not in whole


@pytest.mark.parametrize("took", [True, None, "1200", [1]])
def test_a_time_that_is_no_number_is_not_shown(pieces, took):
    assert 'class="num"' not in pieces.messages(
        history_of({"metadata": {"processing_time_ms": took, "sources": "all"}}), SESSION.session_id
    )


@pytest.mark.parametrize("texts", [[], [""], ["", ""], ["<a>", "&", "'\""], ["a\0<b>", "c"], ["\0", "<"]])
def test_texts_are_escaped_apart_whatever_is_in_them(texts):
    found = list(escaped(texts))

    assert len(found) == len(texts)
    assert [Elements(one + "<end>").words for one in found] == [[text] if text else [] for text in texts]
