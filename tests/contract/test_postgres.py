"""PostgreSQL alone keeps the contract."""

from datetime import timedelta

import pytest

from app.chat import utc_now
from app.postgres.engine import Database
from app.postgres.store import PostgresChatSessionStore
from tests.contract.suite import ChatSessionStoreContract, MakeStore, new_session, texts
from tests.factories import new_append

pytestmark = pytest.mark.anyio


async def age(database: Database, session_id: object, by: timedelta) -> None:
    async with database.connection() as conn:
        await conn.execute(
            "UPDATE chat.chat_sessions SET last_activity = $2 WHERE session_id = $1",
            session_id,
            utc_now() - by,
        )


class TestPostgresStore(ChatSessionStoreContract):
    @pytest.fixture
    def make_store(self, database: Database) -> MakeStore:
        def make(*, ttl_seconds: int = 3600, messages_max: int = 100) -> PostgresChatSessionStore:
            return PostgresChatSessionStore(database, ttl_seconds=ttl_seconds)

        return make

    async def test_a_session_is_archived_after_its_time_to_live(
        self, make_store: MakeStore, database: Database
    ) -> None:
        store = make_store(ttl_seconds=60)
        old, young = await new_session(store, "a"), await new_session(store, "b")
        await age(database, old, timedelta(seconds=61))
        await age(database, young, timedelta(seconds=55))

        listed = {
            status: await store.list_sessions("user123", status=status, limit=10)
            for status in ("active", "archived", "all")
        }

        assert {
            status: ([session.session_id for session in page.sessions], page.total)
            for status, page in listed.items()
        } == {"active": ([young], 1), "archived": ([old], 1), "all": ([young, old], 2)}

    async def test_an_archived_session_is_readable_and_active_again_with_its_next_message(
        self, make_store: MakeStore, database: Database
    ) -> None:
        store = make_store(ttl_seconds=60)
        session_id = await new_session(store, "a")
        await age(database, session_id, timedelta(days=400))
        read = await texts(store, session_id)

        await store.append(new_append(session_id, "b"))

        page = await store.list_sessions("user123", status="active", limit=10)
        assert read == ["a"]
        assert [session.session_id for session in page.sessions] == [session_id]

    async def test_nothing_of_a_deleted_session_is_left(
        self, make_store: MakeStore, database: Database
    ) -> None:
        store = make_store()
        session_id = await new_session(store, "a", "b")
        kept = await new_session(store, "c")

        await store.delete_session(session_id)

        async with database.connection() as conn:
            left = [
                await conn.fetchval(f"SELECT array_agg(DISTINCT session_id) FROM chat.{table}")
                for table in ("chat_sessions", "chat_messages")
            ]
        assert left == [[kept], [kept]]

    async def test_all_messages_stay_available(self, make_store: MakeStore) -> None:
        store = make_store(messages_max=2)

        session_id = await new_session(store, *"abcde")

        assert (await store.get_session(session_id)).session.first_available_seq == 1
        assert await texts(store, session_id) == list("abcde")

    async def test_a_clock_that_steps_back_does_not_turn_a_sessions_activity_back(
        self, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = make_store()
        session_id = await new_session(store, "a")
        before = (await store.get_session(session_id)).session.last_activity
        monkeypatch.setattr("app.postgres.store.utc_now", lambda: before - timedelta(hours=1))

        appended = await store.append(new_append(session_id, "b"))

        assert appended.session.last_activity == before
