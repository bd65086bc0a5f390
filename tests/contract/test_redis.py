"""Redis alone keeps the contract, as long as a session lives."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import pytest
from redis.asyncio import Redis

from app.chat import new_uuid, utc_now
from app.coherence.ports import GuideEntry, NotHandedOver
from app.errors import (
    AdoptionPending,
    NotYetVisible,
    SeqMismatch,
    SessionNotFound,
    SessionTooLarge,
    TurnTakenOver,
    Unadoptable,
)
from app.redis_sessions.client import BoundedRedis
from app.redis_sessions.codec import decode
from app.redis_sessions.keys import session_key, user_key
from app.redis_sessions.store import RedisChatSessionStore
from tests.contract.suite import (
    Call,
    ChatSessionStoreContract,
    MakeStore,
    SlidingTtlContract,
    every_call,
    new_session,
    texts,
    until,
)
from tests.factories import (
    guide_value,
    keyed_append,
    new_answer,
    new_append,
    new_message,
    new_row,
    turn_append,
)
from tests.servers import Servers

pytestmark = pytest.mark.anyio

GARBAGE = [
    b"",
    b"garbage",
    b"{}",
    b"[]",
    b"null",
    b'{"_c":"',
    b'{"_c":"1',
    b'{"_c":"' + b"1" * 400,
    b'{"_c":"' + b"x" * 400,
    b"\xff\x00",
]


class TestRedisStore(ChatSessionStoreContract, SlidingTtlContract):
    @pytest.fixture
    async def make_store(self, servers: Servers, redis: Redis) -> AsyncIterator[MakeStore]:
        async with AsyncExitStack() as stack:

            def make(
                *,
                ttl_seconds: int = 3600,
                messages_max: int = 100,
                session_bytes_max: int = 8 * 1024 * 1024,
                claims: bool = True,
            ) -> RedisChatSessionStore:
                store = RedisChatSessionStore(
                    redis_url=servers.redis_url,
                    session_ttl=ttl_seconds,
                    messages_max=messages_max,
                    session_bytes_max=session_bytes_max,
                    claims=claims,
                )
                stack.push_async_callback(store.close)
                return store

            yield make

    async def test_the_guides_own_arguments_make_a_store(self, servers: Servers, redis: Redis) -> None:
        url = urlsplit(servers.redis_url)
        store = RedisChatSessionStore(
            redis_host=url.hostname, redis_port=url.port, redis_db=1, session_ttl=3600
        )

        session_id = await new_session(store, "a")

        assert await redis.exists(session_key(session_id)) == 1
        await store.close()

    async def test_an_expired_session_is_gone(self, make_store: MakeStore, redis: Redis) -> None:
        store = make_store(ttl_seconds=1)
        session_id = await new_session(store, "a")

        async def expired() -> bool:
            return not await redis.exists(session_key(session_id))

        await until(expired)

        with pytest.raises(SessionNotFound):
            await store.get_session(session_id)
        with pytest.raises(SessionNotFound):
            await store.append(new_append(session_id))
        for status in ("active", "archived", "all"):
            page = await store.list_sessions("user123", status=status, limit=10)
            assert (page.sessions, page.total) == ((), 0)
        assert await redis.dbsize() == 0

    async def test_messages_beyond_the_window_are_gone(self, make_store: MakeStore) -> None:
        store = make_store(messages_max=3)
        session_id = await new_session(store, *"abcde")

        history = await store.read_history(session_id, max_messages=1000)
        older = await store.read_history(session_id, max_messages=10, before_seq=3)

        assert [message.content for message in history.messages] == ["c", "d", "e"]
        assert (history.session.message_count, history.session.first_available_seq) == (5, 3)
        assert (history.first_seq, history.next_before_seq) == (3, None)
        assert (older.lines, older.next_before_seq) == ((), None)

    async def test_a_retry_slides_the_time_to_live(self, make_store: MakeStore, redis: Redis) -> None:
        store = make_store(ttl_seconds=1000)
        session_id = await new_session(store)
        turn = turn_append(session_id, "ask", key="turn", lease_seconds=0.0)
        appended = keyed_append(session_id, "key", "a")
        await store.append(appended)
        await store.begin_turn(turn, window=10)
        left = []
        for retry in (store.append(appended), store.begin_turn(turn, window=10)):
            await redis.expire(session_key(session_id), 100)
            await retry
            left.append(await redis.ttl(session_key(session_id)) > 100)

        assert left == [True, True]

    async def test_a_key_lives_as_long_as_its_messages(self, make_store: MakeStore) -> None:
        store = make_store(messages_max=3)
        session_id = await new_session(store)
        await store.append(keyed_append(session_id, "key", "a", "b"))
        await store.append(new_append(session_id, "c", "d"))

        in_part = await store.append(keyed_append(session_id, "key", "a", "b"))
        await store.append(new_append(session_id, "e"))
        forgotten = await store.append(keyed_append(session_id, "key", "a", "b"))

        assert (in_part.first_seq, in_part.last_seq, in_part.replayed) == (1, 2, True)
        assert (forgotten.first_seq, forgotten.replayed) == (6, False)

    async def test_an_answer_outlives_its_question_for_a_retry(self, make_store: MakeStore) -> None:
        store = make_store(messages_max=3)
        session_id = await new_session(store)
        turn = await store.begin_turn(turn_append(session_id, "question", key="key"), window=10)
        answer = new_answer(turn, "answer")
        await store.finish_turn(turn, answer)
        await store.append(new_append(session_id, "a", "b"))

        again = await store.begin_turn(turn_append(session_id, "question", key="key"), window=10)

        assert again.answer == answer.at(2)
        assert again.question.seq == 1
        assert await texts(store, session_id) == ["answer", "a", "b"]

    async def test_a_session_that_would_pass_its_bound_is_refused_whole(self, make_store: MakeStore) -> None:
        store = make_store(session_bytes_max=10_000)
        session_id = await new_session(store, "a" * 4000)

        with pytest.raises(SessionTooLarge, match="10000 bytes"):
            await store.append(new_append(session_id, "b", "c" * 6000))
        await store.append(new_append(session_id, "d"))

        assert [text[:1] for text in await texts(store, session_id)] == ["a", "d"]

    @pytest.mark.parametrize("contents", [["a"], ["a", "b"]])
    async def test_a_session_may_fill_its_bound_to_the_byte(
        self, make_store: MakeStore, redis: Redis, contents: list[str]
    ) -> None:
        whole = await redis.get(session_key(await new_session(make_store(), *contents)))
        filled, short = make_store(session_bytes_max=len(whole)), make_store(session_bytes_max=len(whole) - 1)

        assert await texts(filled, await new_session(filled, *contents)) == contents
        with pytest.raises(SessionTooLarge):
            await new_session(short, *contents)

    async def test_a_turn_that_ended_holds_nothing(
        self, make_store: MakeStore, redis: Redis, servers: Servers
    ) -> None:
        store = make_store()
        session_id = await new_session(store)
        async with Redis.from_url(servers.redis_url, db=2) as aux:
            turn = await store.begin_turn(turn_append(session_id, "question", key="key"), window=10)
            assert len(await aux.keys("turn:*")) == 1

            await store.finish_turn(turn, new_answer(turn))
            assert await aux.keys("turn:*") == []

            await store.begin_turn(turn_append(session_id, "question", key="key"), window=10)
            assert await aux.keys("turn:*") == []

    async def test_a_window_that_slides_keeps_a_session_below_its_bound(self, make_store: MakeStore) -> None:
        store = make_store(session_bytes_max=10_000, messages_max=2)
        session_id = await new_session(store)

        for number in range(10):
            await store.append(new_append(session_id, f"{number}" * 3000))

        assert [text[:1] for text in await texts(store, session_id)] == ["8", "9"]

    @every_call
    async def test_over_a_database_a_session_in_the_guides_format_waits_for_adoption(
        self, make_store: MakeStore, redis: Redis, call: Call
    ) -> None:
        session_id = new_uuid()
        value = guide_value(session_id, "a", "b")
        await redis.set(session_key(session_id), value, ex=100)

        with pytest.raises(AdoptionPending):
            await call(make_store(claims=False), session_id, "user123")

        assert await redis.get(session_key(session_id)) == value

    async def test_over_a_database_a_session_is_served_once_it_was_handed_over(
        self, make_store: MakeStore, redis: Redis
    ) -> None:
        """Until PostgreSQL says that Redis owns it, a write to it would be one that nobody looks for there."""
        store = make_store(claims=False)
        session_id = new_uuid()
        row = new_row(session_id, message_count=1)
        await store.offer(row, [new_message("a").line(1)], token="0123456789abcdef")
        offered = await redis.get(session_key(session_id))

        for call in (
            store.get_session(session_id),
            store.read_history(session_id, max_messages=10),
            store.append(new_append(session_id, "b")),
            store.begin_turn(turn_append(session_id, "c"), window=10),
        ):
            with pytest.raises(NotHandedOver):
                await call
        assert await redis.get(session_key(session_id)) == offered

        await store.settle(session_id, token="0123456789abcdef")
        await store.append(new_append(session_id, "b"))
        assert await texts(store, session_id) == ["a", "b"]

    async def test_an_offer_replaces_one_that_was_not_taken_up_and_nothing_newer(
        self, make_store: MakeStore, redis: Redis
    ) -> None:
        store = make_store(claims=False)
        row = new_row(message_count=1)
        session_id, key = row.session.session_id, session_key(row.session.session_id)
        first, second = [new_message("a").line(1)], [new_message("b").line(1)]

        assert await store.offer(row, first, token="a" * 16)
        assert await store.offer(row, second, token="b" * 16)
        await store.settle(session_id, token="a" * 16)
        with pytest.raises(NotHandedOver):
            await store.get_session(session_id)
        await store.settle(session_id, token="b" * 16)
        assert not await store.offer(row, first, token="c" * 16)
        assert await texts(store, session_id) == ["b"]

        value = guide_value(session_id, "a", "b")
        await redis.set(key, value)
        assert not await store.offer(row, first, token="d" * 16)
        assert await redis.get(key) == value

    @every_call
    async def test_a_session_in_the_guides_format_is_taken_over_where_it_stands(
        self, make_store: MakeStore, redis: Redis, call: Call
    ) -> None:
        store = make_store()
        session_id, other = new_uuid(), new_uuid()
        for one in (session_id, other):
            await redis.set(session_key(one), guide_value(one, "a", "điều kiện"), ex=100)

        # What a call says of a session of two messages and without turns.
        with suppress(NotYetVisible, SeqMismatch, TurnTakenOver):
            await call(store, session_id, "user123")
        with pytest.raises(SessionNotFound):
            await call(store, other, "somebody else")

        assert (await texts(store, other)) == ["a", "điều kiện"]
        if await redis.exists(session_key(session_id)):
            assert (await texts(store, session_id))[:2] == ["a", "điều kiện"]
            page = await store.list_sessions("user123", limit=10)
            assert {one.session_id for one in page.sessions} == {session_id, other}
        else:
            assert (await store.list_sessions("user123", limit=10)).total == 1

    async def test_a_session_that_is_taken_over_has_the_ids_that_adoption_would_give_it(
        self, make_store: MakeStore, redis: Redis
    ) -> None:
        store = make_store()
        session_id = new_uuid()
        value = guide_value(session_id, "a", "a", "b")
        await redis.set(session_key(session_id), value, ex=100)
        guide = decode(value, session_id)

        history = await store.read_history(session_id, max_messages=10)

        assert isinstance(guide, GuideEntry)
        assert [one.message_id for one in history.messages] == [one.message_id for one in guide.messages]
        assert history.session == guide.session

    async def test_what_the_guides_program_writes_meanwhile_is_taken_over_with_it(
        self, make_store: MakeStore, redis: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = make_store()
        session_id = new_uuid()
        await redis.set(session_key(session_id), guide_value(session_id, "a"), ex=100)
        later = [guide_value(session_id, "a", "b", "c"), guide_value(session_id, "a", "b")]
        script = BoundedRedis.script

        async def late(self: BoundedRedis, name: str, *arguments: Any) -> Any:
            if name == "claim" and later:
                await redis.set(session_key(session_id), later.pop(), keepttl=True)
            return await script(self, name, *arguments)

        monkeypatch.setattr(BoundedRedis, "script", late)

        assert await store.claim(session_id)
        assert 0 < await redis.ttl(session_key(session_id)) <= 100
        assert await texts(store, session_id) == ["a", "b", "c"]
        # As it reads and writes what is in our layout now.
        guides = json.loads(await redis.get(session_key(session_id)))
        guides["messages"].append({"role": "user", "content": "d"})
        await redis.set(session_key(session_id), json.dumps(guides), ex=100)
        assert await texts(store, session_id) == ["a", "b", "c", "d"]
        assert await store.claim(session_id) is False

    @pytest.mark.parametrize(
        ("changed", "why"),
        [
            ((b'"role": "user"', b'"nothing": 1'), "KeyError"),
            ((b"user123", b"\\ud800"), "lone surrogate"),
            ((b'"a"', b'"\\ud800"'), "lone surrogate"),
            ((b"user123", b"u" * 3000), "user id is too long"),
        ],
    )
    @every_call
    async def test_what_can_not_be_written_down_waits_untouched(
        self, make_store: MakeStore, redis: Redis, call: Call, changed: tuple[bytes, bytes], why: str
    ) -> None:
        store = make_store()
        session_id = new_uuid()
        value = guide_value(session_id, "a").replace(*changed)
        await redis.set(session_key(session_id), value, ex=100)

        with pytest.raises(Unadoptable, match=why) as refused:
            await call(store, session_id, "user123")

        assert refused.value.hint == f"look at session:{session_id} in Redis, and correct it there"
        assert await redis.get(session_key(session_id)) == value
        assert await store.claim_all() == 0

    async def test_a_walk_takes_over_what_nobody_touches(self, make_store: MakeStore, redis: Redis) -> None:
        store = make_store()
        ours = await new_session(store, "ours")
        guides = [new_uuid() for _ in range(1200)]
        for session_id in guides:
            await redis.set(session_key(session_id), guide_value(session_id, "a"), ex=100)
        for index, garbage in enumerate(GARBAGE):
            await redis.set(session_key(UUID(int=index)), garbage)
        await redis.lpush("session:list", "x")

        claimed = await store.claim_all()

        assert claimed == len(guides)
        page = await store.list_sessions("user123", limit=2000)
        assert {one.session_id for one in page.sessions} == {ours, *guides}
        assert await store.claim_all() == 0

    @every_call
    async def test_a_value_that_is_no_session_is_not_found(
        self, make_store: MakeStore, redis: Redis, call: Call
    ) -> None:
        store = make_store()
        session_id, other = await new_session(store, "a"), await new_session(store, "b")

        for garbage in GARBAGE:
            await redis.set(session_key(session_id), garbage, ex=100)
            with pytest.raises(SessionNotFound):
                await call(store, session_id, "user123")
            assert await redis.get(session_key(session_id)) == garbage

        assert await texts(store, other) == ["b"]

    @every_call
    async def test_a_torn_value_is_not_found(self, make_store: MakeStore, redis: Redis, call: Call) -> None:
        store = make_store()
        session_id, other = await new_session(store, "a", "b"), await new_session(store, "b")
        value = await redis.get(session_key(session_id))

        for length in range(1, len(value), 37):
            await redis.set(session_key(session_id), value[:length], ex=100)
            with pytest.raises(SessionNotFound):
                await call(store, session_id, "user123")
            assert await redis.get(session_key(session_id)) == value[:length]

        assert await texts(store, other) == ["b"]

    @every_call
    async def test_a_value_whose_lines_are_not_where_its_head_says_is_not_found(
        self, make_store: MakeStore, redis: Redis, call: Call
    ) -> None:
        store = make_store()
        session_id = await new_session(store, "a", "b")
        value = (await redis.get(session_key(session_id))).replace(b'"user123"', b'"user12"')
        await redis.set(session_key(session_id), value, ex=100)

        with pytest.raises(SessionNotFound):
            await call(store, session_id, None)

        assert await redis.get(session_key(session_id)) == value

    @every_call
    async def test_a_key_of_another_type_is_not_found(
        self, make_store: MakeStore, redis: Redis, call: Call
    ) -> None:
        store = make_store()
        session_id, other = await new_session(store, "a"), await new_session(store, "b")
        await redis.delete(session_key(session_id))
        await redis.lpush(session_key(session_id), "a")

        with pytest.raises(SessionNotFound):
            await call(store, session_id, "user123")

        assert await redis.type(session_key(session_id)) == b"list"
        assert await texts(store, other) == ["b"]

    async def test_a_list_passes_over_what_is_no_session(self, make_store: MakeStore, redis: Redis) -> None:
        store = make_store()
        sessions = [await new_session(store, "a") for _ in range(6)]
        await redis.delete(session_key(sessions[0]))
        await redis.lpush(session_key(sessions[0]), "a")
        await redis.set(session_key(sessions[1]), b"garbage", ex=100)
        await redis.set(session_key(sessions[2]), (await redis.get(session_key(sessions[2])))[:200], ex=100)
        await redis.set(session_key(sessions[3]), await redis.get(session_key(sessions[4])), ex=100)

        page = await store.list_sessions("user123", limit=10)

        assert [session.session_id for session in page.sessions] == [sessions[5], sessions[4]]

    async def test_an_entry_of_another_session_is_not_served(
        self, make_store: MakeStore, redis: Redis
    ) -> None:
        store = make_store()
        session_id, other = await new_session(store, "a"), await new_session(store, "b")
        await redis.set(session_key(session_id), await redis.get(session_key(other)), ex=100)

        with pytest.raises(SessionNotFound):
            await store.read_history(session_id, max_messages=10)

    async def test_what_an_operator_deletes_is_gone(self, make_store: MakeStore, redis: Redis) -> None:
        store = make_store()
        first, second = await new_session(store, "a"), await new_session(store, "b")

        await redis.delete(session_key(first))

        with pytest.raises(SessionNotFound):
            await store.get_session(first)
        assert [found.session_id for found in (await store.list_sessions("user123", limit=10)).sessions] == [
            second
        ]
        await redis.flushdb()
        with pytest.raises(SessionNotFound):
            await store.get_session(second)
        assert (await store.list_sessions("user123", limit=10)).total == 0

    async def test_the_index_is_pruned_of_sessions_that_are_long_gone(
        self, make_store: MakeStore, redis: Redis, servers: Servers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = make_store()
        monkeypatch.setattr("app.redis_sessions.store.utc_now", lambda: utc_now() - timedelta(minutes=2))
        old, alive = await new_session(store), await new_session(store)
        monkeypatch.undo()
        young = await new_session(store)
        await redis.delete(session_key(old), session_key(young))

        await store.list_sessions("user123", limit=10)

        async with Redis.from_url(servers.redis_url, db=2) as aux:
            left = await aux.zrange(user_key("user123"), 0, -1)
        assert left == [str(alive).encode(), str(young).encode()]

    async def test_a_script_that_the_server_forgot_is_sent_again(
        self, make_store: MakeStore, redis: Redis
    ) -> None:
        store = make_store()
        session_id = await new_session(store, "a")

        await redis.script_flush()
        await store.append(new_append(session_id, "b"))

        assert await texts(store, session_id) == ["a", "b"]
