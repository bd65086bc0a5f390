"""What every store of chat sessions keeps (`app.store`). One subclass a store says how to make it.

Nothing in here knows which store it holds: facts of one store alone stand in its subclass's file.
"""

import asyncio
import time
import unicodedata
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Protocol
from uuid import UUID, uuid4

import pytest
from redis.asyncio import Redis

from app.chat import ChatSession, Message, json_text, keyed_message_id, new_uuid, utc_now
from app.errors import (
    IdempotencyKeyReused,
    NotYetVisible,
    SeqMismatch,
    SessionNotFound,
    TurnInProgress,
    TurnTakenOver,
)
from app.redis_sessions.keys import session_key
from app.store import Append, ChatSessionStore, Cursor, FinishTurn, SessionPage, Turn
from tests.factories import keyed_append, new_answer, new_append, new_message, new_turn, turn_append

OTHER_DIGEST = "f0" * 16

NFC = unicodedata.normalize("NFC", "Điều kiện tham gia đấu thầu là gì?")
NFD = unicodedata.normalize("NFD", NFC)

TEXTS = {
    "vietnamese composed": NFC,
    "vietnamese decomposed": NFD,
    "emoji": "👩🏽‍💻 🇻🇳 🙂 e\u0301",
    "right to left": "\u202eمرحبا بالعالم\u202c שלום",
    "separators that are line ends to some": "a\u2028b\u2029c\x85d\x0be\x0cf",
    "control characters": "".join(map(chr, range(1, 32))) + "\x7f\x80\x9f",
    "carriage returns": "a\r\nb\rc\n\n",
    "quotes and backslashes": r'"\" \\ \u0041 \n \/ ' + "'`",
    "the end of our own layout": "]}",
    "the separator of our own layout": ',\n{"message_id":"',
    "a line of our own layout": '\n{"message_id":"019a3a04-23ff-7000-8000-000000000000","seq":1,"role":"user"},\n',
    "the head of our own layout": '{"_c":"1p00000000000000000000000001',
    "the end of our own head": ',"messages":[\n',
    "a format string": "%s %d %010d %% {0} {} $1 :name",
    "outside the basic plane": "𝔘𠮷\U0010ffff\ufffd\ufeff",
    "blanks": "  \t ",
    "nothing": "",
}

METADATA = {
    "empty": {},
    "none": [],
    "z before a": {"z": 1, "a": [{}, [], [[]], None, True, False]},
    "floats": [1e16, 5e-324, -0.0, 0.1, 1.7976931348623157e308, 1e-7, 1.0],
    "integers": [10**400, 2**53 + 1, 2**63, -(2**63), 0],
    "text": list(TEXTS.values()),
    "": {"": ""},
}


class MakeStore(Protocol):
    def __call__(self, *, ttl_seconds: int = 3600, messages_max: int = 100) -> ChatSessionStore: ...


Call = Callable[[ChatSessionStore, UUID, str | None], Awaitable[Any]]

#: Every method that takes a session's id and may refuse it.
CALLS: dict[str, Call] = {
    "get_session": lambda store, id_, user: store.get_session(id_, user_id=user),
    "get_session with min_seq": lambda store, id_, user: store.get_session(id_, user_id=user, min_seq=10**9),
    "read_history": lambda store, id_, user: store.read_history(id_, max_messages=10, user_id=user),
    "read_history with before_seq": lambda store, id_, user: store.read_history(
        id_, max_messages=10, before_seq=2, min_seq=10**9, user_id=user
    ),
    "append": lambda store, id_, user: store.append(new_append(id_, user_id=user)),
    "append with if_match": lambda store, id_, user: store.append(
        new_append(id_, user_id=user, if_match=10**9)
    ),
    "keyed append": lambda store, id_, user: store.append(replace(keyed_append(id_, "key"), user_id=user)),
    "begin_turn": lambda store, id_, user: store.begin_turn(turn_append(id_, user_id=user), window=10),
    "keyed begin_turn": lambda store, id_, user: store.begin_turn(
        turn_append(id_, key="turn", user_id=user), window=10
    ),
    "finish_turn": lambda store, id_, user: _finish(store, new_turn(id_, user_id=user)),
    "keyed finish_turn": lambda store, id_, user: _finish(
        store,
        new_turn(id_, user_id=user, lease=FinishTurn(question_id=new_uuid(), token=new_uuid())),
    ),
    "delete_session": lambda store, id_, user: store.delete_session(id_, user_id=user),
}

every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


async def _finish(store: ChatSessionStore, turn: Turn) -> Any:
    return await store.finish_turn(turn, new_answer(turn))


async def new_session(store: ChatSessionStore, *contents: str, user_id: str = "user123") -> UUID:
    """A session with messages, one append each."""
    session_id = (await store.create_session(user_id)).session.session_id
    for content in contents:
        await store.append(new_append(session_id, content))
    return session_id


async def whole(store: ChatSessionStore, session_id: UUID) -> tuple[Message, ...]:
    return (await store.read_history(session_id, max_messages=1000)).messages


async def texts(store: ChatSessionStore, session_id: UUID) -> list[str]:
    return [message.content for message in await whole(store, session_id)]


async def pages(store: ChatSessionStore, session_id: UUID, size: int) -> list[list[int]]:
    """The seqs of each page of a session, from the newest page back to the first."""
    found, before_seq = [], None
    while True:
        history = await store.read_history(session_id, max_messages=size, before_seq=before_seq)
        found.append([message.seq for message in history.messages])
        before_seq = history.next_before_seq
        if before_seq is None:
            return found


async def list_pages(store: ChatSessionStore, user_id: str, limit: int) -> list[SessionPage]:
    found = [await store.list_sessions(user_id, limit=limit)]
    while found[-1].next is not None:
        found.append(await store.list_sessions(user_id, limit=limit, after=found[-1].next))
    return found


async def begin_once_free(store: ChatSessionStore, append: Append, *, window: int = 10) -> Turn:
    """Begins a turn as soon as its lease has ended."""
    deadline = time.monotonic() + 5
    while True:
        try:
            return await store.begin_turn(append, window=window)
        except TurnInProgress:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)


async def until(holds: Callable[[], Awaitable[bool]], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not await holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def outcomes(results: list[Any]) -> Counter[str]:
    """How many of each kind of answer or refusal."""
    return Counter(type(result).__name__ for result in results)


class ChatSessionStoreContract:
    """Subclasses supply `make_store`."""

    @pytest.fixture
    def store(self, make_store: MakeStore) -> ChatSessionStore:
        return make_store()

    # Sessions

    async def test_a_new_session_is_empty_and_belongs_to_its_user(self, store: ChatSessionStore) -> None:
        before = utc_now()

        made = (await store.create_session("user123")).session

        assert made == ChatSession(
            session_id=made.session_id,
            user_id="user123",
            created_at=made.created_at,
            last_activity=made.created_at,
            message_count=0,
        )
        assert made.session_id.version == 7
        assert before <= made.created_at <= utc_now()
        assert (await store.get_session(made.session_id, user_id="user123")).session == made

    async def test_user_ids_are_kept_as_they_are(self, store: ChatSessionStore) -> None:
        for user_id in (*filter(None, TEXTS.values()), "Đ" * 256, "\x01" * 256, "🙂" * 256):
            session_id = await new_session(store, "a", "b", user_id=user_id)

            read = await store.get_session(session_id, user_id=user_id)

            assert read.session.user_id == user_id
            assert await texts(store, session_id) == ["a", "b"]
            assert [
                found.session_id for found in (await store.list_sessions(user_id, limit=10)).sessions
            ] == [session_id]

    async def test_an_append_moves_the_count_and_the_last_activity(self, store: ChatSessionStore) -> None:
        made = (await store.create_session("user123")).session

        appended = await store.append(new_append(made.session_id, "a", "b"))

        assert (appended.first_seq, appended.last_seq, appended.replayed) == (1, 2, False)
        assert appended.session.message_count == 2
        assert appended.session.created_at == made.created_at
        assert appended.session.last_activity >= made.last_activity
        assert (await store.get_session(made.session_id)).session == appended.session

    async def test_both_dependencies_pass_when_they_are_there(self, store: ChatSessionStore) -> None:
        assert {one.status for one in await store.health()} == {"pass"}

    # Messages

    async def test_messages_come_back_as_they_were_sent(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store)
        sent = [
            new_message("question", created_at=datetime(2001, 2, 3, 4, 5, 6, 789000, UTC)),
            new_message(
                "answer", role="assistant", metadata={"sources": ["a.md"], "processing_time_ms": 3500}
            ),
            new_message("rule", role="system"),
            new_message("", role="tool", metadata={"exit": 0}),
        ]

        await store.append(Append(session_id=session_id, messages=sent))

        assert await whole(store, session_id) == tuple(message.at(seq) for seq, message in enumerate(sent, 1))

    @pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
    async def test_text_is_kept_byte_for_byte(self, store: ChatSessionStore, text: str) -> None:
        session_id = await new_session(store, "before", text)

        await store.append(new_append(session_id, text, text, "after"))

        assert await texts(store, session_id) == ["before", text, text, text, "after"]

    async def test_composed_and_decomposed_text_stay_different(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store, NFC, NFD)

        kept = await texts(store, session_id)

        assert [text.encode() for text in kept] == [NFC.encode(), NFD.encode()]
        assert kept[0] != kept[1]

    @pytest.mark.parametrize("metadata", [{}, {"a": []}, {"a": {}}, METADATA], ids=["{}", "[]", "a{}", "all"])
    async def test_metadata_keeps_its_text(self, store: ChatSessionStore, metadata: object) -> None:
        session_id = await new_session(store)

        await store.append(
            Append(session_id=session_id, messages=[new_message(metadata=metadata) for _ in range(3)])
        )
        await store.append(new_append(session_id))

        kept = [message.metadata for message in await whole(store, session_id)]
        assert kept == [*([json_text(metadata)] * 3), "{}"]

    async def test_numbers_in_metadata_keep_their_digits_and_their_kind(
        self, store: ChatSessionStore
    ) -> None:
        session_id = await new_session(store)
        numbers = [1e16, 5e-324, 10**400, -0.0, 0.1, 1.0, 1]

        await store.append(
            Append(session_id=session_id, messages=[new_message(metadata={"n": n}) for n in numbers])
        )

        assert [message.metadata for message in await whole(store, session_id)] == [
            '{"n":1e+16}',
            '{"n":5e-324}',
            f'{{"n":1{"0" * 400}}}',
            '{"n":-0.0}',
            '{"n":0.1}',
            '{"n":1.0}',
            '{"n":1}',
        ]

    async def test_a_hundred_messages_fit_one_append(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store)
        sent = [f"message {number}" for number in range(100)]

        appended = await store.append(new_append(session_id, *sent))

        assert (appended.first_seq, appended.last_seq) == (1, 100)
        assert await texts(store, session_id) == sent

    # Order

    async def test_concurrent_appends_stand_one_after_another_without_gaps(
        self, store: ChatSessionStore
    ) -> None:
        session_id = await new_session(store)
        sent = [[f"{number}.{part}" for part in range(number % 3 + 1)] for number in range(50)]

        appended = await asyncio.gather(
            *(store.append(new_append(session_id, *contents)) for contents in sent)
        )

        messages = await whole_backwards(store, session_id)
        assert [message.seq for message in messages] == list(range(1, sum(map(len, sent)) + 1))
        by_seq = {message.seq: message.content for message in messages}
        assert [[by_seq[seq] for seq in range(one.first_seq, one.last_seq + 1)] for one in appended] == sent

    async def test_appends_to_many_sessions_at_once_stay_in_their_sessions(
        self, store: ChatSessionStore
    ) -> None:
        sessions = [await new_session(store) for _ in range(10)]

        await asyncio.gather(
            *(store.append(new_append(id_, f"{id_} {number}")) for number in range(4) for id_ in sessions)
        )

        kept = {id_: await texts(store, id_) for id_ in sessions}
        assert {id_: sorted(found) for id_, found in kept.items()} == {
            id_: [f"{id_} {number}" for number in range(4)] for id_ in sessions
        }

    async def test_an_append_is_read_by_whoever_asks_after_it(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store)

        seen = []
        for number in range(1, 11):
            await store.append(new_append(session_id, str(number)))
            reads = await asyncio.gather(*(store.get_session(session_id) for _ in range(3)))
            seen.append({read.session.message_count for read in reads})

        assert seen == [{number} for number in range(1, 11)]

    # Pages of a history

    async def test_a_history_is_the_newest_messages_oldest_first(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store, *"abcde")

        history = await store.read_history(session_id, max_messages=3)

        assert [message.content for message in history.messages] == ["c", "d", "e"]
        assert (history.first_seq, history.next_before_seq) == (3, 3)
        assert history.session.message_count == 5

    async def test_a_history_of_an_empty_session_has_no_pages(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store)

        history = await store.read_history(session_id, max_messages=10)

        assert (history.lines, history.first_seq, history.next_before_seq) == ((), 1, None)

    async def test_a_history_may_ask_for_more_than_there_is(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store, *"abc")

        history = await store.read_history(session_id, max_messages=1000)

        assert [message.content for message in history.messages] == ["a", "b", "c"]
        assert (history.first_seq, history.next_before_seq) == (1, None)

    @pytest.mark.parametrize(
        ("before_seq", "seqs", "first_seq", "next_before_seq"),
        [
            (1, [], 1, None),
            (2, [1], 1, None),
            (3, [1, 2], 1, None),
            (4, [2, 3], 2, 2),
            (6, [4, 5], 4, 4),
            (7, [4, 5], 4, 4),
            (2**31 - 1, [4, 5], 4, 4),
            (2**63, [4, 5], 4, 4),
        ],
    )
    async def test_before_seq_ends_a_page(
        self,
        store: ChatSessionStore,
        before_seq: int,
        seqs: list[int],
        first_seq: int,
        next_before_seq: int | None,
    ) -> None:
        session_id = await new_session(store, *"abcde")

        history = await store.read_history(session_id, max_messages=2, before_seq=before_seq)

        assert [message.seq for message in history.messages] == seqs
        assert (history.first_seq, history.next_before_seq) == (first_seq, next_before_seq)

    @pytest.mark.parametrize("size", [1, 4, 25, 1000])
    async def test_paging_backwards_visits_every_message_once(self, make_store: MakeStore, size: int) -> None:
        store = make_store(messages_max=10)
        session_id = await new_session(store, *map(str, range(25)))
        first = (await store.get_session(session_id)).session.first_available_seq

        found = await pages(store, session_id, size)

        assert sorted(seq for page in found for seq in page) == list(range(first, 26))
        assert [page[0] for page in found] == sorted((page[0] for page in found), reverse=True)
        assert {len(page) for page in found[:-1]} <= {size}

    async def test_a_page_does_not_move_when_messages_are_appended(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store, *"abcdef")
        newest = await store.read_history(session_id, max_messages=2)

        await store.append(new_append(session_id, "g", "h", "i"))

        older = await store.read_history(session_id, max_messages=2, before_seq=newest.next_before_seq)
        assert [message.content for message in older.messages] == ["c", "d"]
        assert older.session.message_count == 9

    async def test_an_append_may_be_larger_than_the_window(self, make_store: MakeStore) -> None:
        store = make_store(messages_max=3)
        session_id = await new_session(store)

        first = await store.append(new_append(session_id, *"abcdefgh"))
        second = await store.append(new_append(session_id, *"ijklm"))
        third = await store.append(new_append(session_id, "n"))

        history = await store.read_history(session_id, max_messages=3)
        assert [(one.first_seq, one.last_seq) for one in (first, second, third)] == [
            (1, 8),
            (9, 13),
            (14, 14),
        ]
        assert [(message.seq, message.content) for message in history.messages] == [
            (12, "l"),
            (13, "m"),
            (14, "n"),
        ]
        assert history.session.message_count == 14

    async def test_a_window_of_one_message_holds_the_newest(self, make_store: MakeStore) -> None:
        store = make_store(messages_max=1)
        session_id = await new_session(store, *"abc")

        history = await store.read_history(session_id, max_messages=1)

        assert [(message.seq, message.content) for message in history.messages] == [(3, "c")]

    # Who may see a session

    @every_call
    async def test_a_foreign_session_does_not_exist_for_the_caller(
        self, store: ChatSessionStore, call: Call
    ) -> None:
        session_id = await new_session(store, "a", user_id="owner")
        before = (await store.get_session(session_id)).session

        with pytest.raises(SessionNotFound):
            await call(store, session_id, "mallory")

        assert (await store.get_session(session_id, user_id="owner")).session == before
        assert await texts(store, session_id) == ["a"]

    @every_call
    async def test_an_unknown_session_is_not_found(self, store: ChatSessionStore, call: Call) -> None:
        for unknown in (new_uuid(), uuid4(), UUID(int=0), UUID(int=2**128 - 1)):
            with pytest.raises(SessionNotFound):
                await call(store, unknown, None)

    @pytest.mark.parametrize("almost", ["user", "user1234", "USER123", "user123 ", "", 'user123","x'])
    async def test_a_user_id_must_be_equal_to_own_a_session(
        self, store: ChatSessionStore, almost: str
    ) -> None:
        session_id = await new_session(store, user_id="user123")

        with pytest.raises(SessionNotFound):
            await store.append(new_append(session_id, user_id=almost))
        with pytest.raises(SessionNotFound):
            await store.get_session(session_id, user_id=almost)
        with pytest.raises(SessionNotFound):
            await store.delete_session(session_id, user_id=almost)

    # Deletion

    @every_call
    async def test_a_deleted_session_is_gone_for_every_call(
        self, store: ChatSessionStore, call: Call
    ) -> None:
        session_id = await new_session(store, "a", "b")
        await store.delete_session(session_id)

        with pytest.raises(SessionNotFound):
            await call(store, session_id, "user123")

    async def test_a_delete_returns_what_the_session_was(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store, "a", "b")
        before = (await store.get_session(session_id)).session

        deleted = await store.delete_session(session_id, user_id="user123")

        assert deleted == before

    async def test_a_deleted_session_leaves_the_list_and_its_neighbours(
        self, store: ChatSessionStore
    ) -> None:
        kept, gone = await new_session(store, "kept"), await new_session(store, "gone")

        await store.delete_session(gone)

        page = await store.list_sessions("user123", status="all", limit=10)
        assert ([session.session_id for session in page.sessions], page.total) == ([kept], 1)
        assert await texts(store, kept) == ["kept"]

    async def test_of_two_deletes_at_once_one_finds_the_session(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store, "a")

        results = await asyncio.gather(
            *(store.delete_session(session_id) for _ in range(5)), return_exceptions=True
        )

        assert outcomes(results) == {"ChatSession": 1, "SessionNotFound": 4}

    async def test_an_append_that_races_a_delete_is_before_it_or_refused(
        self, store: ChatSessionStore
    ) -> None:
        sessions = [await new_session(store, "a") for _ in range(10)]

        results = await asyncio.gather(
            *(
                call
                for id_ in sessions
                for call in (store.append(new_append(id_)), store.delete_session(id_))
            ),
            return_exceptions=True,
        )

        after = await asyncio.gather(*(store.get_session(id_) for id_ in sessions), return_exceptions=True)
        assert set(outcomes(results)) <= {"Appended", "ChatSession", "SessionNotFound"}
        assert outcomes(results)["ChatSession"] == 10
        assert outcomes(list(after)) == {"SessionNotFound": 10}

    # Lists

    async def test_a_list_is_newest_first_and_has_a_total_on_every_page(
        self, store: ChatSessionStore
    ) -> None:
        made = [await new_session(store) for _ in range(5)]
        await new_session(store, user_id="somebody else")

        found = await list_pages(store, "user123", limit=2)

        assert [[session.session_id for session in page.sessions] for page in found] == [
            made[4:2:-1],
            made[2:0:-1],
            made[:1],
        ]
        assert [page.total for page in found] == [5, 5, 5]

    async def test_a_list_that_ends_with_a_full_page_has_no_next(self, store: ChatSessionStore) -> None:
        made = [await new_session(store) for _ in range(4)]

        found = await list_pages(store, "user123", limit=2)

        assert [session.session_id for page in found for session in page.sessions] == made[::-1]
        assert len(found) == 2

    async def test_sessions_of_one_moment_are_listed_by_id(
        self, store: ChatSessionStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        moment = utc_now()
        for module in ("app.postgres.store", "app.redis_sessions.store"):
            monkeypatch.setattr(f"{module}.utc_now", lambda: moment)
        ids = [uuid4() for _ in range(7)]
        for module in ("app.postgres.store", "app.redis_sessions.store"):
            monkeypatch.setattr(f"{module}.new_uuid", iter(ids).__next__)
        for _ in ids:
            await store.create_session("user123")

        found = await list_pages(store, "user123", limit=3)

        assert [session.session_id for page in found for session in page.sessions] == sorted(
            ids, reverse=True
        )
        assert {page.total for page in found} == {7}

    async def test_a_cursor_past_the_end_still_has_the_total(self, store: ChatSessionStore) -> None:
        await new_session(store)
        await new_session(store)

        page = await store.list_sessions(
            "user123",
            limit=10,
            after=Cursor(created_at=datetime(2000, 1, 1, tzinfo=UTC), session_id=UUID(int=0)),
        )

        assert (page.sessions, page.total, page.next) == ((), 2, None)

    async def test_a_session_made_while_a_list_is_read_does_not_shift_it(
        self, store: ChatSessionStore
    ) -> None:
        made = [await new_session(store) for _ in range(4)]
        first = await store.list_sessions("user123", limit=2)

        await new_session(store)
        await store.delete_session(made[3])

        second = await store.list_sessions("user123", limit=2, after=first.next)
        assert [session.session_id for session in second.sessions] == made[1::-1]
        assert second.total == 4

    async def test_a_list_of_an_unknown_user_is_empty(self, store: ChatSessionStore) -> None:
        page = await store.list_sessions("nobody", limit=10)

        assert (page.sessions, page.total, page.next) == ((), 0, None)

    async def test_a_young_session_is_active_and_not_archived(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store, "a")
        session = (await store.get_session(session_id)).session

        listed = {
            status: (await store.list_sessions("user123", status=status, limit=10))
            for status in ("active", "archived", "all")
        }

        assert {status: (page.sessions, page.total) for status, page in listed.items()} == {
            "active": ((session,), 1),
            "archived": ((), 0),
            "all": ((session,), 1),
        }

    # Idempotency

    async def test_a_request_with_a_key_is_stored_once(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store, "before")
        first = await store.append(keyed_append(session_id, "key", "a"))

        again = await store.append(keyed_append(session_id, "key", "a"))

        assert (first.first_seq, first.last_seq, first.replayed) == (2, 2, False)
        assert (again.first_seq, again.last_seq, again.replayed) == (2, 2, True)
        assert await texts(store, session_id) == ["before", "a"]

    async def test_a_replay_finds_its_messages_behind_later_ones(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store)
        await store.append(keyed_append(session_id, "key", "a", "b", "c"))
        await store.append(keyed_append(session_id, "other key", "d"))
        await store.append(new_append(session_id, "e"))

        again = await store.append(keyed_append(session_id, "key", "a", "b", "c"))

        assert (again.first_seq, again.last_seq, again.replayed) == (1, 3, True)
        assert again.session.message_count == 5
        assert await texts(store, session_id) == list("abcde")

    async def test_of_equal_requests_at_once_exactly_one_appends(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store, "before")

        results = await asyncio.gather(
            *(store.append(keyed_append(session_id, "key", "a", "b")) for _ in range(20))
        )

        assert Counter(result.replayed for result in results) == {True: 19, False: 1}
        assert {(result.first_seq, result.last_seq) for result in results} == {(2, 3)}
        assert await texts(store, session_id) == ["before", "a", "b"]

    async def test_a_message_that_is_stored_without_its_request_is_no_answer_to_it(
        self, store: ChatSessionStore
    ) -> None:
        """As in a file that somebody has left the digests out of."""
        session_id = await new_session(store)
        request = keyed_append(session_id, "key", "a")
        (message,) = request.messages
        alone = replace(message, request_digest=None, request_size=None)
        await store.append(replace(request, messages=(alone,)))

        with pytest.raises(IdempotencyKeyReused):
            await store.append(request)

        assert await texts(store, session_id) == ["a"]

    async def test_a_key_cannot_be_used_for_another_request(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store)
        await store.append(keyed_append(session_id, "key", "a", "b"))

        for other in (
            keyed_append(session_id, "key", "x", digest=OTHER_DIGEST),
            keyed_append(session_id, "key", "x", "y", "z", digest=OTHER_DIGEST),
        ):
            with pytest.raises(IdempotencyKeyReused):
                await store.append(other)
        with pytest.raises(IdempotencyKeyReused):
            await store.begin_turn(turn_append(session_id, "x", key="key", digest=OTHER_DIGEST), window=10)

        assert await texts(store, session_id) == ["a", "b"]

    async def test_a_key_of_a_turn_cannot_be_used_for_an_append(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store)
        turn = await store.begin_turn(turn_append(session_id, "question", key="key"), window=10)
        await store.finish_turn(turn, new_answer(turn, "answer"))

        with pytest.raises(IdempotencyKeyReused):
            await store.append(keyed_append(session_id, "key", "x", digest=OTHER_DIGEST))

        assert await texts(store, session_id) == ["question", "answer"]

    async def test_a_key_belongs_to_one_session(self, store: ChatSessionStore) -> None:
        first, second = await new_session(store), await new_session(store)
        await store.append(keyed_append(first, "key", "a"))

        appended = await store.append(keyed_append(second, "key", "b", digest=OTHER_DIGEST))

        assert not appended.replayed
        assert (await texts(store, first), await texts(store, second)) == (["a"], ["b"])

    async def test_a_key_looks_at_whole_requests(self, store: ChatSessionStore) -> None:
        """Message 10 of key `k` and message 0 of key `k1` must not have one id."""
        session_id = await new_session(store)
        await store.append(keyed_append(session_id, "k", *map(str, range(12))))

        appended = await store.append(keyed_append(session_id, "k1", "a", "b", digest=OTHER_DIGEST))

        assert (appended.first_seq, appended.replayed) == (13, False)

    # Turns

    async def test_a_turn_is_a_question_and_its_answer(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store, "a", "b")

        turn = await store.begin_turn(turn_append(session_id, "question", key="key"), window=10)
        finished = await store.finish_turn(turn, new_answer(turn, "answer"))

        assert (turn.question.content, turn.question.seq, turn.answer) == ("question", 3, None)
        assert turn.lease is not None
        assert turn.session.message_count == 3
        assert (finished.first_seq, finished.last_seq, finished.replayed) == (4, 4, False)
        assert await texts(store, session_id) == ["a", "b", "question", "answer"]

    async def test_a_question_is_durable_before_its_answer(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store)

        await store.begin_turn(turn_append(session_id, "question", key="key"), window=10)

        assert await texts(store, session_id) == ["question"]

    @pytest.mark.parametrize("key", [None, "key"])
    @pytest.mark.parametrize(
        ("window", "expected"),
        [(1, ["question"]), (2, ["c", "question"]), (4, ["a", "b", "c", "question"]), (1000, None)],
    )
    async def test_a_turns_history_is_the_newest_messages_up_to_the_question(
        self, store: ChatSessionStore, key: str | None, window: int, expected: list[str] | None
    ) -> None:
        session_id = await new_session(store, "a", "b", "c")

        turn = await store.begin_turn(turn_append(session_id, "question", key=key), window=window)

        assert [message.content for message in turn.history] == (expected or ["a", "b", "c", "question"])
        assert turn.history[-1] == turn.question

    async def test_a_turn_without_a_key_has_no_lease(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store)

        turn = await store.begin_turn(turn_append(session_id, "question"), window=10)
        await store.abandon_turn(turn)
        finished = await store.finish_turn(turn, new_answer(turn, "answer"))

        assert turn.lease is None
        assert finished.last_seq == 2
        assert await texts(store, session_id) == ["question", "answer"]

    async def test_a_retry_of_an_answered_turn_gets_the_answer(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store, "before")
        first = await store.begin_turn(turn_append(session_id, "question", key="key"), window=10)
        answer = new_answer(first, "answer")
        await store.finish_turn(first, answer)
        await store.append(new_append(session_id, "after"))

        again = await store.begin_turn(turn_append(session_id, "question", key="key"), window=10)

        assert again.answer == answer.at(3)
        assert again.question == first.question
        assert await texts(store, session_id) == ["before", "question", "answer", "after"]

    async def test_a_retry_of_a_running_turn_is_told_to_wait(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store)
        await store.begin_turn(turn_append(session_id, "question", key="key", lease_seconds=20), window=10)

        with pytest.raises(TurnInProgress) as refused:
            await store.begin_turn(turn_append(session_id, "question", key="key"), window=10)

        assert 15 < refused.value.retry_after_seconds <= 20
        assert await texts(store, session_id) == ["question"]

    async def test_a_running_turns_key_cannot_be_used_for_another_request(
        self, store: ChatSessionStore
    ) -> None:
        session_id = await new_session(store)
        await store.begin_turn(turn_append(session_id, "question", key="key"), window=10)

        with pytest.raises(IdempotencyKeyReused):
            await store.begin_turn(turn_append(session_id, "x", key="key", digest=OTHER_DIGEST), window=10)

    async def test_of_equal_turns_at_once_exactly_one_runs(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store)

        results = await asyncio.gather(
            *(store.begin_turn(turn_append(session_id, "question", key="key"), window=10) for _ in range(10)),
            return_exceptions=True,
        )

        assert outcomes(results) == {"Turn": 1, "TurnInProgress": 9}
        assert await texts(store, session_id) == ["question"]

    async def test_a_retry_takes_over_when_the_lease_has_ended(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store, "before")
        late = await store.begin_turn(
            turn_append(session_id, "question", key="key", lease_seconds=0.05), window=10
        )
        await store.append(new_append(session_id, "meanwhile"))

        retry = await begin_once_free(store, turn_append(session_id, "question", key="key"))

        assert (retry.question, retry.answer) == (late.question, None)
        assert [message.content for message in retry.history] == ["before", "question"]
        with pytest.raises(TurnTakenOver):
            await store.finish_turn(late, new_answer(late, "late answer"))
        await store.finish_turn(retry, new_answer(retry, "answer"))
        assert await texts(store, session_id) == ["before", "question", "meanwhile", "answer"]

    async def test_a_late_holder_is_refused_after_the_answer_too(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store)
        late = await store.begin_turn(
            turn_append(session_id, "question", key="key", lease_seconds=0.05), window=10
        )
        retry = await begin_once_free(store, turn_append(session_id, "question", key="key"))
        await store.finish_turn(retry, new_answer(retry, "answer"))

        with pytest.raises(TurnTakenOver):
            await store.finish_turn(late, new_answer(late, "late answer"))

        assert await texts(store, session_id) == ["question", "answer"]

    async def test_of_retries_at_once_one_takes_over(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store)
        first = await store.begin_turn(turn_append(session_id, "question", key="key"), window=10)
        await store.abandon_turn(first)

        results = await asyncio.gather(
            *(store.begin_turn(turn_append(session_id, "question", key="key"), window=10) for _ in range(10)),
            return_exceptions=True,
        )

        assert outcomes(results) == {"Turn": 1, "TurnInProgress": 9}

    async def test_a_late_holder_that_nobody_replaced_may_still_answer(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store)
        late = await store.begin_turn(
            turn_append(session_id, "question", key="key", lease_seconds=0.001), window=10
        )
        await asyncio.sleep(0.01)

        await store.finish_turn(late, new_answer(late, "answer"))

        assert await texts(store, session_id) == ["question", "answer"]

    async def test_an_abandoned_turn_can_be_retried_at_once(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store)
        failed = await store.begin_turn(turn_append(session_id, "question", key="key"), window=10)

        await store.abandon_turn(failed)
        retry = await store.begin_turn(turn_append(session_id, "question", key="key"), window=10)

        with pytest.raises(TurnTakenOver):
            await store.finish_turn(failed, new_answer(failed, "late answer"))
        await store.finish_turn(retry, new_answer(retry, "answer"))
        assert await texts(store, session_id) == ["question", "answer"]

    async def test_abandoning_a_turn_that_another_holds_does_nothing(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store)
        failed = await store.begin_turn(turn_append(session_id, "question", key="key"), window=10)
        await store.abandon_turn(failed)
        retry = await store.begin_turn(turn_append(session_id, "question", key="key"), window=10)

        await store.abandon_turn(failed)

        with pytest.raises(TurnInProgress):
            await store.begin_turn(turn_append(session_id, "question", key="key"), window=10)
        await store.finish_turn(retry, new_answer(retry))

    async def test_a_turn_of_a_deleted_session_is_not_found(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store)
        turn = await store.begin_turn(turn_append(session_id, "question", key="key"), window=10)
        await store.delete_session(session_id)

        await store.abandon_turn(turn)
        with pytest.raises(SessionNotFound):
            await store.finish_turn(turn, new_answer(turn))

    async def test_a_turn_knows_the_ids_of_its_messages(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store)

        turn = await store.begin_turn(turn_append(session_id, "question", key="key"), window=10)

        assert turn.question.message_id == keyed_message_id(session_id, "key", 0)
        assert turn.answer_id == keyed_message_id(session_id, "key", 1)

    # Versions

    async def test_if_match_lets_the_append_at_that_seq_through(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store)

        await store.append(new_append(session_id, "a", if_match=0))
        await store.append(new_append(session_id, "b", if_match=1))
        turn = await store.begin_turn(turn_append(session_id, "c", if_match=2), window=10)

        assert turn.question.seq == 3

    @pytest.mark.parametrize("if_match", [0, 1, 3, 10**10])
    async def test_if_match_refuses_every_other_seq(self, store: ChatSessionStore, if_match: int) -> None:
        session_id = await new_session(store, "a", "b")

        with pytest.raises(SeqMismatch) as refused:
            await store.append(new_append(session_id, "x", if_match=if_match))
        with pytest.raises(SeqMismatch):
            await store.begin_turn(turn_append(session_id, "x", key="key", if_match=if_match), window=10)

        assert refused.value.current_seq == 2
        assert await texts(store, session_id) == ["a", "b"]

    async def test_of_appends_with_one_if_match_exactly_one_is_stored(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store, "a")

        results = await asyncio.gather(
            *(store.append(new_append(session_id, f"b{number}", if_match=1)) for number in range(10)),
            return_exceptions=True,
        )

        assert outcomes(results) == {"Appended": 1, "SeqMismatch": 9}
        assert (await store.get_session(session_id)).session.message_count == 2

    async def test_a_replay_is_answered_before_if_match_is_looked_at(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store, "a")
        await store.append(replace(keyed_append(session_id, "key", "b"), if_match=1))
        await store.append(new_append(session_id, "c"))

        again = await store.append(replace(keyed_append(session_id, "key", "b"), if_match=1))

        assert (again.first_seq, again.replayed) == (2, True)

    async def test_a_reused_key_is_refused_before_if_match_is_looked_at(
        self, store: ChatSessionStore
    ) -> None:
        session_id = await new_session(store)
        await store.append(keyed_append(session_id, "key", "a"))

        with pytest.raises(IdempotencyKeyReused):
            await store.append(
                replace(keyed_append(session_id, "key", "b", digest=OTHER_DIGEST), if_match=99)
            )

    async def test_a_running_turn_is_refused_before_if_match_is_looked_at(
        self, store: ChatSessionStore
    ) -> None:
        session_id = await new_session(store)
        await store.begin_turn(turn_append(session_id, "a", key="key", if_match=0), window=10)

        with pytest.raises(TurnInProgress):
            await store.begin_turn(turn_append(session_id, "a", key="key", if_match=0), window=10)

    async def test_min_seq_is_what_the_caller_knows_to_be_there(self, store: ChatSessionStore) -> None:
        session_id = await new_session(store, "a", "b")

        read = await store.get_session(session_id, min_seq=2)
        history = await store.read_history(session_id, max_messages=1, min_seq=2)

        assert (read.session.message_count, history.session.message_count) == (2, 2)
        with pytest.raises(NotYetVisible):
            await store.get_session(session_id, min_seq=3)
        with pytest.raises(NotYetVisible):
            await store.read_history(session_id, max_messages=1, min_seq=3)
        with pytest.raises(NotYetVisible):
            await store.read_history(session_id, max_messages=1, before_seq=2, min_seq=2**63)


async def whole_backwards(store: ChatSessionStore, session_id: UUID) -> list[Message]:
    """All messages of a session, page by page from the newest, in the order of their seqs."""
    messages: list[Message] = []
    before_seq = None
    while True:
        history = await store.read_history(session_id, max_messages=60, before_seq=before_seq)
        messages[:0] = history.messages
        before_seq = history.next_before_seq
        if before_seq is None:
            return messages


class SlidingTtlContract:
    """What the stores that use Redis keep besides: every use of a session slides its time to live."""

    async def test_a_session_has_a_time_to_live_from_its_first_moment(
        self, make_store: MakeStore, redis: Redis
    ) -> None:
        session_id = await new_session(make_store(ttl_seconds=100))

        assert 95_000 < await redis.pttl(session_key(session_id)) <= 100_000

    @pytest.mark.parametrize(
        "use",
        [
            lambda store, id_: store.get_session(id_),
            lambda store, id_: store.read_history(id_, max_messages=1),
            lambda store, id_: store.append(new_append(id_)),
            lambda store, id_: store.begin_turn(turn_append(id_), window=1),
            lambda store, id_: store.begin_turn(turn_append(id_, key="key"), window=1),
        ],
        ids=["get_session", "read_history", "append", "begin_turn", "keyed begin_turn"],
    )
    async def test_every_use_of_a_session_slides_its_time_to_live(
        self, make_store: MakeStore, redis: Redis, use: Callable[[ChatSessionStore, UUID], Awaitable[Any]]
    ) -> None:
        store = make_store(ttl_seconds=100)
        session_id = await new_session(store, "a")
        await redis.pexpire(session_key(session_id), 10_000)

        await use(store, session_id)

        assert 95_000 < await redis.pttl(session_key(session_id)) <= 100_000

    async def test_a_list_slides_nothing(self, make_store: MakeStore, redis: Redis) -> None:
        store = make_store(ttl_seconds=100)
        session_id = await new_session(store, "a")
        await redis.pexpire(session_key(session_id), 10_000)

        await store.list_sessions("user123", limit=10)

        assert 5_000 < await redis.pttl(session_key(session_id)) <= 10_000

    async def test_a_key_is_never_without_a_time_to_live(self, make_store: MakeStore, redis: Redis) -> None:
        store = make_store(messages_max=3)
        session_id = await new_session(store)

        left = []
        for number in range(40):
            await store.append(new_append(session_id, str(number)))
            left.append(await redis.pttl(session_key(session_id)))

        assert min(left) > 3_000_000

    async def test_the_sessions_database_holds_one_key_a_session(
        self, make_store: MakeStore, redis: Redis
    ) -> None:
        store = make_store()
        sessions = [await new_session(store, "a") for _ in range(3)]
        for session_id in sessions:
            turn = await store.begin_turn(turn_append(session_id, key="key"), window=10)
            await store.finish_turn(turn, new_answer(turn))
            await store.begin_turn(turn_append(session_id, key="other key"), window=10)
        await store.list_sessions("user123", limit=10)

        assert await redis.dbsize() == 3
        assert sorted(await redis.keys("*")) == sorted(session_key(id_).encode() for id_ in sessions)
