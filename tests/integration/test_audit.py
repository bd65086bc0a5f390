"""Both stores compared under the row lock: every kind of difference, planted by hand; the sampler; the commands."""

import asyncio
import json
import logging
import os
import pty
import subprocess
import time
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace

import pytest

from app.chat import new_uuid
from app.coherence.heartbeat import next_state
from app.coherence.ports import EPOCH_ZERO, CacheOutage, Entry
from app.errors import AdoptionPending, SessionNotFound
from app.maintenance import sampler as sampler_module
from app.maintenance.audit import WRONG, Auditor
from app.maintenance.sampler import Sampler
from app.maintenance.survey import NOT_WELL, survey
from app.postgres import counters
from app.postgres.counters import compare_counters
from app.redis_sessions.codec import FIELDS, decode, encode
from app.redis_sessions.keys import session_key, session_of
from app.redis_sessions.scan import scan_sessions
from app.tasks import stop
from tests.contract.suite import until
from tests.factories import guide_value, new_append, new_row
from tests.integration.processes import called, command, environment
from tests.stores import new_hybrid

pytestmark = pytest.mark.anyio

TTL = 3600
OUT = {
    "DATABASE_URL": "postgresql://chat:sesame@127.0.0.1:1/chat",
    "REDIS_URL": "redis://:sesame@127.0.0.1:1",
}


@pytest.fixture
async def stack():
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def hybrid(stack, servers, database, state):
    return new_hybrid(stack, database, servers.redis_url, state=state)


@pytest.fixture
def auditor(hybrid):
    return auditor_of(hybrid)


@pytest.fixture
def sampler(hybrid, auditor):
    return Sampler(auditor, hybrid.cache, hybrid.lease, hybrid.counts)


def auditor_of(hybrid, cache=None):
    return Auditor(hybrid.durable, cache or hybrid.cache, hybrid.store, messages_max=100)


async def new_session(hybrid, *contents):
    """A session with its entry, trusted."""
    session_id = (await hybrid.store.create_session("an")).session.session_id
    await hybrid.store.append(new_append(session_id, *(contents or ("Xin chào", "zwei", "drei"))))
    return session_id


# Differences, planted by hand. Each takes the session's key and value and leaves the difference in Redis.


class Hand:
    """What an operator, a bug or another program might do to one session, in either store."""

    def __init__(self, redis, database, state, session_id):
        self.redis = redis
        self.database = database
        self.state = state
        self.session_id = session_id
        self.key = session_key(session_id)

    async def splice(self, field, text):
        await self.redis.setrange(self.key, FIELDS[field][0], text)

    async def set(self, value):
        await self.redis.set(self.key, value, ex=TTL)

    async def row(self, statement, *values):
        async with self.database.connection() as conn:
            await conn.execute(statement, *values)

    async def entry(self):
        entry = decode(await self.redis.get(self.key), self.session_id)
        assert isinstance(entry, Entry)
        return entry

    async def nothing(self):
        pass

    async def deleted(self):
        await self.redis.delete(self.key)

    async def other_chain(self):
        await self.splice("chain", "0123456789abcdef")

    async def other_text(self):
        value = await self.redis.get(self.key)
        await self.set(value.replace(b"zwei", b"ZWEI"))

    async def one_message_less(self):
        """As it stood before the last message, still trusted: what the guarantee forbids."""
        entry = await self.entry()
        first, second, _ = entry.body.split(b",\n")
        row = replace(
            new_row(self.session_id, user_id="an", message_count=2),
            session=replace(entry.session, message_count=2),
        )
        await self.set(encode(row, epoch=self.state.epoch, lines=[first.decode(), second.decode()]))

    async def message_that_postgresql_lost(self):
        await self.row("DELETE FROM chat.chat_messages WHERE session_id = $1 AND seq = 3", self.session_id)

    async def other_user(self):
        await self.set((await self.redis.get(self.key)).replace(b'"user_id":"an"', b'"user_id":"ba"'))

    async def trusted_without_row(self):
        await self.row("DELETE FROM chat.chat_sessions WHERE session_id = $1", self.session_id)

    async def older_without_row(self):
        await self.splice("epoch", EPOCH_ZERO)
        await self.row("DELETE FROM chat.chat_sessions WHERE session_id = $1", self.session_id)

    async def dirty_without_row(self):
        await self.splice("pending", "0000000004")
        await self.row("DELETE FROM chat.chat_sessions WHERE session_id = $1", self.session_id)

    async def being_made(self):
        """A skeleton whose row is not committed yet."""
        await self.row("DELETE FROM chat.chat_sessions WHERE session_id = $1", self.session_id)
        await self.set(
            encode(new_row(self.session_id), epoch=self.state.epoch, lines=(), pending=1, token="1" * 16)
        )

    async def list_type(self):
        await self.redis.delete(self.key)
        await self.redis.lpush(self.key, "a")
        await self.redis.expire(self.key, TTL)

    async def torn(self):
        await self.set((await self.redis.get(self.key))[:-5])

    async def of_another_session(self):
        await self.set(encode(new_row(), epoch=self.state.epoch, lines=()))

    async def unreadable_without_row(self):
        await self.set('{"session_id": 7, "messages": "gone"}')
        await self.row("DELETE FROM chat.chat_sessions WHERE session_id = $1", self.session_id)

    async def torn_and_owned_by_redis(self):
        await self.owned_by_redis()
        await self.torn()

    async def persistent(self):
        await self.redis.persist(self.key)

    async def persistent_and_dirty(self):
        await self.redis.persist(self.key)
        await self.splice("pending", "0000000004")

    async def dirty(self):
        await self.splice("pending", "0000000004")

    async def older(self):
        await self.splice("epoch", EPOCH_ZERO)

    async def older_and_other_chain(self):
        await self.older()
        await self.other_chain()

    async def owned_by_redis(self):
        await self.splice("owner", "r")

    async def owned_by_redis_without_row(self):
        await self.owned_by_redis()
        await self.row("DELETE FROM chat.chat_sessions WHERE session_id = $1", self.session_id)
        await self.row("DELETE FROM chat.chat_messages WHERE session_id = $1", self.session_id)

    async def owned_by_redis_for_ever(self):
        await self.owned_by_redis()
        await self.redis.persist(self.key)

    async def row_of_redis(self):
        await self.row("UPDATE chat.chat_sessions SET owner = 'redis' WHERE session_id = $1", self.session_id)

    async def guide(self):
        await self.row("DELETE FROM chat.chat_sessions WHERE session_id = $1", self.session_id)
        await self.row("DELETE FROM chat.chat_messages WHERE session_id = $1", self.session_id)
        await self.set(guide_value(self.session_id, "Xin chào", "hai"))

    async def guide_for_ever(self):
        await self.guide()
        await self.redis.persist(self.key)


# what was done -> the verdict, what repair does about it, the verdict after that
PLANTED = {
    "nothing": ("same", None, "same"),
    "deleted": ("absent", None, "absent"),
    "other_chain": ("violation", "filled", "same"),
    "other_text": ("violation", "filled", "same"),
    "one_message_less": ("violation", "filled", "same"),
    "message_that_postgresql_lost": ("incomplete", "left", "incomplete"),
    "other_user": ("violation", "filled", "same"),
    "trusted_without_row": ("violation", "removed", "absent"),
    "older_without_row": ("without-row", "removed", "absent"),
    "dirty_without_row": ("without-row", "removed", "absent"),
    "being_made": ("dirty", None, "dirty"),
    "list_type": ("unreadable", "filled", "same"),
    "torn": ("unreadable", "filled", "same"),
    "of_another_session": ("unreadable", "filled", "same"),
    "unreadable_without_row": ("unreadable", "left", "unreadable"),
    "torn_and_owned_by_redis": ("unreadable", "left", "unreadable"),
    "persistent": ("no-ttl", "filled", "same"),
    "persistent_and_dirty": ("no-ttl", "filled", "same"),
    "dirty": ("dirty", None, "dirty"),
    "older": ("older", None, "older"),
    "older_and_other_chain": ("different", None, "different"),
    "owned_by_redis": ("redis-owned", "adopted", "same"),
    "owned_by_redis_without_row": ("redis-owned", "adopted", "same"),
    "owned_by_redis_for_ever": ("redis-owned", "adopted", "same"),
    "row_of_redis": ("redis-owned", "adopted", "same"),
    "guide": ("guide", "adopted", "same"),
    "guide_for_ever": ("guide", "adopted", "same"),
}
HARMLESS = [name for name, (_, mending, _) in PLANTED.items() if mending is None]


@pytest.fixture
def hand(redis, database, state, hybrid):
    async def plant(name):
        session_id = await new_session(hybrid)
        hand = Hand(redis, database, state, session_id)
        await getattr(hand, name)()
        return hand

    return plant


async def everything(redis):
    """All that Redis holds, with the time to live to the second."""
    keys = sorted(await redis.keys())
    return {key: (await redis.dump(key), await redis.ttl(key)) for key in keys}


@pytest.mark.parametrize(("name", "verdict"), [(name, one[0]) for name, one in PLANTED.items()])
async def test_a_difference_that_was_planted_gets_its_verdict_and_nothing_is_changed(
    hand, auditor, redis, hybrid, name, verdict
):
    planted = await hand(name)
    before = await everything(redis)
    counted = replace(hybrid.counts)

    finding = await auditor.audit(planted.session_id)

    assert finding.verdict == verdict
    assert {key: value for key, (value, _) in (await everything(redis)).items()} == {
        key: value for key, (value, _) in before.items()
    }
    assert hybrid.counts == counted


@pytest.mark.parametrize(
    ("name", "difference"),
    [
        ("other_chain", "entry (seq 3, chain 0123456789abcdef), row (seq 3, chain "),
        ("other_text", "the text of message 2 differs"),
        ("one_message_less", "entry (seq 2, chain 0000000000000000), row (seq 3, chain "),
        ("message_that_postgresql_lost", ", which has 2 of the newest 3 messages"),
        ("other_user", "the entry has another user_id"),
        ("trusted_without_row", ", no row"),
    ],
)
async def test_a_difference_says_where_and_not_what(hand, auditor, name, difference):
    planted = await hand(name)

    finding = await auditor.audit(planted.session_id)

    assert difference in finding.difference
    assert not any(word in finding.difference for word in ("Xin", "zwei", "ZWEI", "'an'", "'ba'"))


@pytest.mark.parametrize(("name", "mending", "after"), [(name, *one[1:]) for name, one in PLANTED.items()])
async def test_repair_mends_what_is_wrong_and_nothing_else(hand, auditor, redis, name, mending, after):
    planted = await hand(name)
    before = await redis.dump(planted.key)

    _, done = await auditor.repair(planted.session_id)

    found = await auditor.audit(planted.session_id)
    assert (done, found.verdict) == (mending, after)
    assert (await redis.dump(planted.key) == before) == (mending in {None, "left"})
    if after == "same":
        assert 0 < await redis.ttl(planted.key) <= TTL


async def forget(hand, auditor):
    await hand.deleted()


async def repair(hand, auditor):
    await auditor.repair(hand.session_id)


@pytest.mark.parametrize("mend", [forget, repair])
async def test_after_an_edit_by_sql_either_way_of_the_documentation_serves_it(hand, auditor, hybrid, mend):
    planted = await hand("nothing")
    await planted.row(
        "UPDATE chat.chat_messages SET content = 'ZWEI' WHERE session_id = $1 AND seq = 2", planted.session_id
    )
    await mend(planted, auditor)
    history = await hybrid.store.read_history(planted.session_id, max_messages=9)
    assert [message.content for message in history.messages] == ["Xin chào", "ZWEI", "drei"]


@pytest.mark.parametrize(
    "name",
    ["owned_by_redis_without_row", "guide", "owned_by_redis_for_ever", "guide_for_ever", "owned_by_redis"],
)
async def test_a_repair_never_loses_a_word_that_redis_alone_has(hand, auditor, hybrid, name):
    planted = await hand(name)
    value = decode(await planted.redis.get(planted.key), planted.session_id)
    words = [message.content for message in value.messages]
    assert words

    await auditor.repair(planted.session_id)

    history = await hybrid.durable.read_history(planted.session_id, max_messages=100)
    assert [message.content for message in history.messages] == words


@pytest.mark.parametrize(
    "name", ["owned_by_redis_without_row", "guide", "torn_and_owned_by_redis", "unreadable_without_row"]
)
@pytest.mark.parametrize(
    "changes", [{"mode": "redis-only"}, {"cache": "off"}], ids=["redis-only", "cache off"]
)
async def test_while_redis_is_the_truth_or_is_not_trusted_nothing_is_touched(
    hand, auditor, hybrid, redis, name, changes
):
    planted = await hand(name)
    before = await redis.dump(planted.key)
    await change_state(hybrid, **changes)

    with suppress(AdoptionPending):
        await auditor.repair(planted.session_id)

    assert await redis.dump(planted.key) == before


@pytest.mark.parametrize("name", ["other_chain", "trusted_without_row", "persistent", "torn"])
async def test_nothing_is_mended_while_nobody_believes_redis(hand, auditor, hybrid, redis, name):
    planted = await hand(name)
    before = await redis.dump(planted.key)
    await change_state(hybrid, cache="off")

    finding, done = await auditor.repair(planted.session_id)

    assert finding.verdict != "violation"
    assert done in {None, "left"}
    assert await redis.dump(planted.key) == before


async def change_state(hybrid, **changes):
    state = await hybrid.keeper.read()
    state = await hybrid.keeper.change(state, next_state(state, **changes))
    await hybrid.keeper.settle(state)
    hybrid.lease.learn(await hybrid.keeper.read(), asked_at=hybrid.lease.now())


async def test_an_entry_is_only_looked_at_on_the_redis_of_the_epoch(hand, auditor, hybrid):
    planted = await hand("nothing")
    await change_state(hybrid, redis_identity="another/redis")

    with pytest.raises(CacheOutage):
        await auditor.audit(planted.session_id)


async def test_a_window_that_is_shorter_than_the_session_is_compared_line_by_line(
    stack, servers, database, state, redis
):
    hybrid = new_hybrid(stack, database, servers.redis_url, state=state, messages_max=3)
    auditor = auditor_of(hybrid)
    session_id = await new_session(hybrid, *"abcdefg")
    assert (await auditor.audit(session_id)).verdict == "same"
    value = await redis.get(session_key(session_id))
    assert decode(value, session_id).first_seq == 5

    await redis.set(session_key(session_id), value.replace(b'"content":"f"', b'"content":"F"'), ex=TTL)

    assert "message 6 differs" in (await auditor.audit(session_id)).difference


async def test_a_shorter_window_does_not_replace_the_only_copy_of_what_postgresql_lost(hand, hybrid, redis):
    planted = await hand("nothing")
    await planted.row("DELETE FROM chat.chat_messages WHERE session_id = $1 AND seq = 1", planted.session_id)
    before = await redis.dump(planted.key)
    auditor = Auditor(hybrid.durable, hybrid.cache, hybrid.store, messages_max=1)

    finding, done = await auditor.repair(planted.session_id)

    assert (finding.verdict, done) == ("incomplete", "left")
    assert await redis.dump(planted.key) == before


# Races: an alarm must never be false


async def test_a_session_that_is_made_between_the_lock_and_the_look_is_no_difference(
    stack, servers, database, state
):
    """There is no row to lock when the audit begins; the entry is clean when it looks."""
    hybrid = new_hybrid(stack, database, servers.redis_url, state=state)
    late = new_hybrid(stack, database, servers.redis_url, state=state)
    session_id = new_uuid()

    class Cache:
        """Reaches Redis only once the session is there."""

        def __init__(self):
            self.made = False

        def __getattr__(self, name):
            return getattr(late.cache, name)

        def reach(self, reached):
            assert self.made
            return late.cache.reach(reached)

    cache = Cache()
    locked = hybrid.durable.locked
    looks = []

    @asynccontextmanager
    async def made_after_the_lock(one):
        async with locked(one) as found:
            looks.append(found.row)
            if not cache.made:
                await make(hybrid, database, session_id, state, late.cache)
                cache.made = True
            yield found

    hybrid.durable.locked = made_after_the_lock

    finding = await auditor_of(hybrid, cache).audit(session_id)

    assert finding.verdict == "same"
    assert [row is None for row in looks] == [True, False]


async def make(hybrid, database, session_id, state, cache):
    """A session with an id of ours, as `create_session` makes one."""
    row = new_row(session_id)
    await cache.skeleton([row], state, token="a" * 16)
    async with database.connection() as conn:
        await conn.execute(
            "INSERT INTO chat.chat_sessions (session_id, user_id, created_at, last_activity) VALUES ($1, $2, $3, $3)",
            session_id,
            row.session.user_id,
            row.session.created_at,
        )
    await cache.settle([session_id], state, token="a" * 16)


async def test_four_writers_give_no_false_alarm(stack, servers, database, state, redis):
    """Creates, appends, turns, reads and deletes on two instances, every entry audited again and again meanwhile."""
    instances = [new_hybrid(stack, database, servers.redis_url, state=state) for _ in range(2)]
    auditor = auditor_of(instances[0])
    ends_at = time.monotonic() + 3
    alive = []
    written = 0

    async def write(number):
        nonlocal written
        store = instances[number % 2].store
        while time.monotonic() < ends_at:
            session_id = (await store.create_session("an")).session.session_id
            alive.append(session_id)
            for turn in range(6):
                target = alive[(number * 7 + turn) % len(alive)]
                with suppress(SessionNotFound):
                    await store.append(new_append(target, f"{number}.{turn}", "hai"))
                    await store.read_history(target, max_messages=10)
                    written += 1
            if len(alive) > 8:
                with suppress(SessionNotFound):
                    await store.delete_session(alive.pop(0))

    found = []

    async def look():
        while time.monotonic() < ends_at:
            for key in await redis.keys():
                finding = await auditor.audit(session_of(key.decode()))
                found.append((finding.verdict, finding.difference))

    await asyncio.gather(*(write(number) for number in range(4)), look(), look())

    # However slow the machine is.
    assert written > 20
    assert len(found) > 20
    assert [one for one in found if one[0] in WRONG] == []
    assert {verdict for verdict, _ in found} <= {"same", "dirty", "absent", "different", "older"}
    assert "same" in {verdict for verdict, _ in found}


async def test_an_audit_waits_for_the_writer_that_holds_the_row(hand, hybrid, auditor, state):
    """An entry that is marked, of a row that is locked: the look comes after the commit."""
    planted = await hand("nothing")
    async with hybrid.durable.locked(planted.session_id):
        looking = asyncio.create_task(auditor.audit(planted.session_id))
        await asyncio.sleep(0.05)
        await planted.other_chain()
        assert not looking.done()
        await planted.set((await hybrid_value(planted)).replace(b"0123456789abcdef", b"0" * 16))

    assert (await looking).difference.startswith("entry (seq 3, chain 0000000000000000), row")


async def hybrid_value(planted):
    return await planted.redis.get(planted.key)


async def test_a_violation_is_not_mended_out_of_a_table_that_has_lost_messages(hand, auditor):
    """What stands in Redis, wrong as it is, may be the only copy of them."""
    planted = await hand("message_that_postgresql_lost")
    await planted.other_chain()
    before = await planted.redis.dump(planted.key)

    finding, mending = await auditor.repair(planted.session_id)

    assert (finding.verdict, mending) == ("violation", "left")
    assert await planted.redis.dump(planted.key) == before


# The sampler


async def test_the_sampler_counts_logs_and_unlinks_a_violation(hand, sampler, hybrid, redis, caplog):
    planted = await hand("other_chain")
    chain = (await hybrid.durable.lookup(planted.session_id))[0].chain.hex()

    await sampler.sample()

    assert (hybrid.counts.cache_samples, hybrid.counts.cache_violations) == (1, 1)
    assert await redis.exists(planted.key) == 0
    [record] = [one for one in caplog.records if one.levelno == logging.ERROR]
    assert str(planted.session_id) in record.getMessage()
    assert f"entry (seq 3, chain 0123456789abcdef), row (seq 3, chain {chain})" in record.getMessage()
    assert (await hybrid.store.read_history(planted.session_id, max_messages=1)).source == "postgres"

    await sampler.sample()

    assert (hybrid.counts.cache_samples, hybrid.counts.cache_violations) == (2, 1)


async def test_a_violation_is_counted_and_logged_where_redis_goes_out_before_it_is_unlinked(
    hand, hybrid, monkeypatch, caplog
):
    planted = await hand("other_chain")
    monkeypatch.setattr(hybrid.cache, "remove", goes_out)

    await Sampler(auditor_of(hybrid), hybrid.cache, hybrid.lease, hybrid.counts).sample()

    assert (hybrid.counts.cache_samples, hybrid.counts.cache_violations) == (1, 1)
    assert str(planted.session_id) in caplog.text


async def goes_out(*_args):
    raise CacheOutage("as the test says")


@pytest.mark.parametrize(
    "name", [name for name, one in PLANTED.items() if one[0] not in {"violation", "absent"}]
)
async def test_the_sampler_leaves_everything_else_as_it_is(hand, sampler, hybrid, redis, caplog, name):
    planted = await hand(name)
    before = await redis.dump(planted.key), await redis.ttl(planted.key)

    await sampler.sample()

    assert hybrid.counts.cache_violations == 0
    assert await redis.dump(planted.key) == before[0]
    assert await redis.ttl(planted.key) in {before[1], before[1] - 1}
    errors = [one.getMessage() for one in caplog.records if one.levelno >= logging.ERROR]
    assert len(errors) == (name == "message_that_postgresql_lost")
    assert all("PostgreSQL lacks messages" in text and str(planted.session_id) in text for text in errors)


@pytest.mark.parametrize("changes", [{"cache": "off"}, {"mode": "redis-only"}, {"mode": "draining"}], ids=str)
async def test_the_sampler_rests_while_nobody_may_believe_redis_or_it_is_drained(
    hand, sampler, hybrid, changes
):
    planted = await hand("other_chain")
    await change_state(hybrid, **changes)

    await sampler.sample()

    assert hybrid.counts.cache_samples == 0
    assert await planted.redis.exists(planted.key) == 1


async def test_the_sampler_of_an_empty_redis_does_nothing(sampler, hybrid, redis):
    await redis.set("a stranger's key", "a", ex=TTL)
    await sampler.sample()
    await redis.flushdb()
    await sampler.sample()

    assert hybrid.counts.cache_samples == 0


async def test_the_sampler_outlives_outages_and_its_own_errors(hand, hybrid, auditor, monkeypatch):
    """Redis, PostgreSQL and the code fail one after the other; the violation is found after that."""
    planted = await hand("other_chain")
    monkeypatch.setattr(sampler_module, "SAMPLE_EVERY_SECONDS", 0.01)
    errors = [CacheOutage("out"), ConnectionError("out"), ZeroDivisionError(), OSError()]

    class Failing:
        async def distrust(self, session_id):
            if errors:
                raise errors.pop()
            return await auditor.distrust(session_id)

    sampler = Sampler(Failing(), hybrid.cache, hybrid.lease, hybrid.counts)
    running = asyncio.create_task(sampler.run())

    async def found() -> bool:
        return hybrid.counts.cache_violations == 1

    await until(found)
    await stop(running)

    assert errors == []
    assert await planted.redis.exists(planted.key) == 0


# Counters in PostgreSQL


async def flaws(database, *, deep=False):
    rows, found = 0, []
    async for count, wrong in compare_counters(database, deep=deep):
        rows += count
        found += wrong
    return rows, sorted((one.flaw, str(one.session_id)) for one in found)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE chat.chat_sessions SET message_count = 4 WHERE session_id = $1",
        "UPDATE chat.chat_sessions SET message_count = 2 WHERE session_id = $1",
        "DELETE FROM chat.chat_messages WHERE session_id = $1 AND seq = 2",
        "DELETE FROM chat.chat_messages WHERE session_id = $1 AND seq = 3",
        "DELETE FROM chat.chat_messages WHERE session_id = $1",
        "UPDATE chat.chat_messages SET seq = 9 WHERE session_id = $1 AND seq = 2",
    ],
)
async def test_a_row_that_miscounts_its_messages_is_found(hand, database, statement):
    await hand("nothing")
    planted = await hand("nothing")
    assert await flaws(database) == (2, [])

    await planted.row(statement, planted.session_id)

    assert await flaws(database) == (2, [("miscounted", str(planted.session_id))])
    assert await flaws(database, deep=True) == (2, [("miscounted", str(planted.session_id))])


async def test_a_chain_is_computed_again_only_where_that_is_asked_for(hand, database, monkeypatch):
    """In pages that are smaller than a session, and that hold several."""
    monkeypatch.setattr(counters, "_PAGE_SESSIONS", 2)
    monkeypatch.setattr(counters, "_PAGE_MESSAGES", 4)
    planted = [await hand("nothing") for _ in range(5)]
    await hand("nothing")
    wrong = planted[3]
    assert await flaws(database, deep=True) == (6, [])

    await wrong.row(
        "UPDATE chat.chat_messages SET message_id = gen_random_uuid() WHERE session_id = $1 AND seq = 3",
        wrong.session_id,
    )

    assert await flaws(database) == (6, [])
    assert await flaws(database, deep=True) == (6, [("wrong-chain", str(wrong.session_id))])


async def test_counters_agree_while_writers_write(hybrid, database, monkeypatch):
    monkeypatch.setattr(counters, "_PAGE_SESSIONS", 3)
    monkeypatch.setattr(counters, "_PAGE_MESSAGES", 7)
    sessions = [await new_session(hybrid) for _ in range(6)]
    ends_at = time.monotonic() + 1
    looks = 0

    async def write(number):
        while time.monotonic() < ends_at:
            await hybrid.store.append(new_append(sessions[number], "a", "b"))
            await hybrid.store.delete_session(await new_session(hybrid))

    async def look():
        nonlocal looks
        while time.monotonic() < ends_at:
            assert (await flaws(database, deep=True))[1] == []
            looks += 1

    await asyncio.gather(*(write(number) for number in range(4)), look())

    assert looks > 3


# The walk


async def test_one_entry_that_fails_does_not_hide_the_others(hand, hybrid, auditor, redis):
    planted = [await hand("nothing") for _ in range(3)]

    async def examine(session_id):
        if session_id == planted[1].session_id:
            raise OverflowError("date value out of range")
        return await auditor.audit(session_id), None

    found = await survey(
        scan_sessions(hybrid.cache.reach(hybrid.lease.state)), examine, advance=lambda _: None
    )

    assert dict(found.outcomes) == {"same": 2, "failed": 1}
    assert (found.left, [one.what for one in found.named]) == (1, [str(planted[1].session_id)])


async def test_an_outage_in_the_middle_of_a_walk_is_that_outage(hand, hybrid):
    await hand("nothing")

    async def examine(_):
        raise CacheOutage("redis: gone")

    with pytest.raises(CacheOutage, match="gone"):
        await survey(scan_sessions(hybrid.cache.reach(hybrid.lease.state)), examine, advance=lambda _: None)


# The commands


@pytest.fixture
def call(tmp_path, database_url, servers, state):
    urls = {"DATABASE_URL": database_url, "REDIS_URL": servers.redis_url}
    return lambda words, **settings: called(*words.split(), cwd=tmp_path, **urls | settings)


async def calling(call, words, **settings):
    return await asyncio.to_thread(call, words, **settings)


async def state_row(database):
    async with database.connection() as conn:
        return dict(await conn.fetchrow("SELECT * FROM chat.cache_state"))


async def test_verify_of_stores_that_agree_ends_with_0(hand, call, database):
    for name in HARMLESS:
        await hand(name)
    await hand("owned_by_redis")
    before = await state_row(database)

    done = await calling(call, "verify --json")
    printed = await calling(call, "verify --deep")

    found = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert found["outcomes"] == {"same": 1, "older": 1, "dirty": 2, "different": 1, "redis-owned": 1}
    assert (found["entries"], found["wrong"], found["named"]) == (6, 0, [])
    assert found["rows"] == {"checked": 6, "wrong": {}}
    assert (printed.returncode, printed.stderr) == (0, "")
    assert ["same", "1", "trusted, and what PostgreSQL has"] in [
        line.split("\t") for line in printed.stdout.splitlines()
    ]
    assert await state_row(database) == before


async def test_verify_names_what_is_wrong_and_ends_with_1_until_it_is_repaired(hand, call, redis):
    planted = {
        name: await hand(name) for name, one in PLANTED.items() if one[0] in WRONG and one[1] != "left"
    }
    planted |= {name: await hand(name) for name in ("guide", "owned_by_redis_without_row", "row_of_redis")}

    before = await calling(call, "verify --json")
    repaired = await calling(call, "repair --json")
    after = await calling(call, "verify --json")

    assert (before.returncode, repaired.returncode) == (1, 0), repaired
    found = json.loads(before.stdout)
    assert found["wrong"] == 12
    assert found["outcomes"]["violation"] == 5
    assert {one["outcome"] for one in found["named"]} == {"violation", "without-row", "unreadable", "no-ttl"}
    named = {one["session_id"] for one in found["named"]}
    assert str(planted["persistent"].session_id) in named
    mended = json.loads(repaired.stdout)
    assert mended["mended"] == {"filled": 9, "removed": 3, "adopted": 3}
    assert mended["wrong"] == 0
    assert (after.returncode, json.loads(after.stdout)["outcomes"]) == (0, {"same": 12})


async def test_repair_leaves_to_people_what_nobody_else_has_and_ends_with_1(hand, call, redis):
    planted = await hand("unreadable_without_row")
    await redis.set("session:none-of-ours", "a", ex=TTL)
    before = await redis.dump(planted.key)

    done = await calling(call, "repair")

    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert (done.returncode, done.stderr) == (1, "")
    assert ["unreadable", str(planted.session_id), "what stands there is no session's value"] in lines
    assert ["stranger", "session:none-of-ours", ""] in lines
    assert await redis.dump(planted.key) == before
    assert await redis.exists("session:none-of-ours") == 1


async def test_verify_finds_rows_that_are_wrong(hand, call):
    miscounted, chain = await hand("deleted"), await hand("deleted")
    await miscounted.row(
        "DELETE FROM chat.chat_messages WHERE session_id = $1 AND seq = 2", miscounted.session_id
    )
    await chain.row(
        "UPDATE chat.chat_sessions SET chain = decode('0123456789abcdef', 'hex') WHERE session_id = $1",
        chain.session_id,
    )

    shallow, deep = await calling(call, "verify"), await calling(call, "verify --deep --json")
    sample = await calling(call, "verify --sample 5")

    assert (shallow.returncode, deep.returncode, sample.returncode) == (1, 1, 0)
    assert str(miscounted.session_id) in shallow.stdout
    assert json.loads(deep.stdout)["rows"] == {"checked": 2, "wrong": {"miscounted": 1, "wrong-chain": 1}}
    assert {one["session_id"] for one in json.loads(deep.stdout)["wrong_rows"]} == {
        str(miscounted.session_id),
        str(chain.session_id),
    }


async def test_a_sample_is_as_many_entries_as_were_asked_for(hand, call):
    for _ in range(3):
        await hand("nothing")

    done = await calling(call, "verify --sample 7 --json")

    assert json.loads(done.stdout)["outcomes"] == {"same": 7}


@pytest.mark.parametrize("words", ["verify", "repair", "verify --json"])
@pytest.mark.parametrize("out", ["DATABASE_URL", "REDIS_URL"])
async def test_a_store_that_is_out_is_neither_well_nor_wrong(call, words, out):
    done = await calling(call, words, **{out: OUT[out]})

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "sesame" not in done.stderr


@pytest.mark.parametrize("words", ["verify", "repair"])
async def test_a_command_on_another_redis_says_so_and_leaves_the_epoch_to_the_services(
    call, hybrid, database, words
):
    await change_state(hybrid, redis_identity="another/redis")
    before = await state_row(database)

    done = await calling(call, words)

    assert (done.returncode, done.stdout) == (2, "")
    assert "REDIS_URL leads to another Redis" in done.stderr
    assert await state_row(database) == before


async def test_nothing_is_compared_before_a_service_has_started(call, database):
    async with database.connection() as conn:
        await conn.execute("TRUNCATE chat.cache_state")

    done = await calling(call, "verify")

    assert (done.returncode, done.stdout) == (2, "")
    assert "start the service once" in done.stderr
    async with database.connection() as conn:
        assert await conn.fetchval("SELECT count(*) FROM chat.cache_state") == 0


async def test_without_redis_only_the_rows_are_compared(hand, call):
    await hand("other_chain")

    verified = await calling(call, "verify --json", ENABLE_REDIS_SESSIONS="false")
    repaired = await calling(call, "repair", ENABLE_REDIS_SESSIONS="false")

    assert (verified.returncode, json.loads(verified.stdout)["entries"]) == (0, 0)
    assert json.loads(verified.stdout)["rows"]["checked"] == 1
    assert (repaired.returncode, repaired.stdout) == (2, "")
    assert "ENABLE_REDIS_SESSIONS=false" in repaired.stderr


async def test_commands_while_the_cache_is_off_look_and_mend_nothing(hand, call, hybrid, redis):
    planted = await hand("torn")
    await hand("nothing")
    await change_state(hybrid, cache="off", redis_identity=None)

    verified = await calling(call, "verify --json")
    repaired = await calling(call, "repair --json")

    assert (verified.returncode, repaired.returncode) == (1, 1)
    assert json.loads(verified.stdout)["outcomes"] == {"older": 1, "unreadable": 1}
    assert json.loads(repaired.stdout)["mended"] == {"left": 1}
    assert await redis.exists(planted.key) == 1


async def test_on_a_terminal_a_bar_shows_how_far_it_is(hand, tmp_path, database_url, servers):
    await hand("nothing")
    terminal, inside = pty.openpty()
    with subprocess.Popen(  # noqa: ASYNC220 - it ends by itself
        command("verify"),
        cwd=tmp_path,
        env=environment(TERM="xterm", COLUMNS=100, DATABASE_URL=database_url, REDIS_URL=servers.redis_url),
        stdout=subprocess.PIPE,
        stderr=inside,
    ) as process:
        os.close(inside)
        shown = await asyncio.to_thread(read_all, terminal)
        printed = process.stdout.read()
    os.close(terminal)

    assert process.returncode == 0
    assert "entries in Redis" in shown
    assert "rows in PostgreSQL" in shown
    assert "\x1b" not in printed.decode()


def read_all(terminal):
    chunks = []
    with suppress(OSError):
        while chunk := os.read(terminal, 65536):
            chunks.append(chunk)
    return b"".join(chunks).decode()


@pytest.mark.parametrize("words", ["verify --sample 0", "verify --bogus", "repair now"])
async def test_wrong_arguments_are_explained(call, words):
    done = await calling(call, words)

    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage: " in done.stderr


def test_what_is_not_well_is_in_every_meaning():
    from app.cli.surveys import MEANING

    assert set(NOT_WELL) <= set(MEANING)
    assert {verdict for verdict, *_ in PLANTED.values()} <= set(MEANING)
