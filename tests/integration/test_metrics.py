"""What `GET /metrics` says, against what really happened; and that nothing that is counted is left out."""

import asyncio
from dataclasses import fields
from pathlib import Path
from uuid import UUID

import prometheus_client
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from app.api import metrics as metrics_module
from app.api.metrics import own_metrics, share_metrics
from app.chat import new_uuid
from app.coherence.counts import Counts
from app.coherence.heartbeat import next_state
from app.coherence.ports import EPOCH_ZERO
from app.errors import DurableStoreUnavailable
from app.maintenance import sampler as sampler_module
from app.metrics import COUNTERS
from app.redis_sessions.codec import FIELDS
from app.redis_sessions.keys import session_key
from tests.contract.suite import until
from tests.factories import guide_value
from tests.integration.api_client import SESSIONS, assert_problem, for_mode, open_api

pytestmark = pytest.mark.anyio

DOCS = Path(__file__).parents[2] / "docs" / "operations.md"

GAUGES = {"chat_mode", "chat_store_up", "chat_cache_trusted", "chat_lease_seconds_left"} | {
    "chat_rollup_lag_seconds",
    "chat_rollup_dirty_sessions",
    "chat_rollup_set_aside_sessions",
}


@pytest.fixture
async def api(settings):
    # However busy the machine is, a Redis that answers late must not be a change of the epoch here.
    async with open_api(settings, redis_timeout_ms=10_000) as api:
        yield api


async def scraped(api):
    """Each sample by its name, labels in braces."""
    answer = await api.get("/metrics")
    assert answer.status_code == 200, answer.text
    return {
        sample.name + "".join(f"{{{value}}}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


async def eventually(api, name, value):
    """What is told once the metric has grown to `value`."""
    found = {}

    async def grown():
        found.update(await scraped(api))
        return found[name] >= value

    await until(grown, seconds=30)
    return found


def key_of(session):
    return session_key(UUID(session.rpartition("/")[2]))


# Nothing is left out


def test_every_count_has_a_metric():
    """Whoever adds a count says here how it is told."""
    assert set(COUNTERS) == {field.name for field in fields(Counts)}


async def test_every_count_is_told_with_its_own_value(api):
    counts = api.runtime.stores.counts
    values = {field.name: 1000.0 + index for index, field in enumerate(fields(Counts))}
    for name, value in values.items():
        setattr(counts, name, type(getattr(counts, name))(value))

    found = await scraped(api)

    assert {name: found[f"{told.name}_total"] // 1 for name, told in COUNTERS.items()} == values


async def test_the_names_are_those_that_people_were_told(api):
    found = await scraped(api)

    assert {name.partition("{")[0] for name in found} == GAUGES | {
        "chat_cache_hits_total",
        "chat_cache_fills_total",
        "chat_cache_validations_total",
        "chat_lease_expired_reads_total",
        "chat_unverified_reads_total",
        "chat_cache_epoch_changes_total",
        "chat_writes_held_total",
        "chat_hold_seconds_total",
        "chat_heartbeats_missed_total",
        "chat_sessions_adopted_total",
        "chat_cache_samples_total",
        "cache_violations_total",
    }


async def test_every_metric_is_in_the_runbook_and_its_help_says_something(api):
    text = (await api.get("/metrics")).text
    families = list(text_string_to_metric_families(text))

    assert all(len(family.documentation) > 40 and family.documentation.endswith(".") for family in families)
    assert [family.name for family in families if family.name not in DOCS.read_text()] == []
    assert {family.type for family in families} == {"counter", "gauge"}


# Counters move with what happens


async def test_hits_fills_and_validations(api, redis):
    session = await api.new_session()
    await api.record(session, "Xin chào")
    before = await scraped(api)

    await api.contents(session)
    hit = await scraped(api)
    await redis.delete(key_of(session))
    await api.contents(session)
    filled = await scraped(api)
    await redis.setrange(key_of(session), FIELDS["epoch"][0], EPOCH_ZERO)
    await api.contents(session)
    validated = await scraped(api)

    assert moved(before, hit) == {"chat_cache_hits_total": 1}
    assert moved(hit, filled) == {"chat_cache_fills_total": 1}
    assert moved(filled, validated) == {"chat_cache_validations_total": 1}


def moved(before, after):
    """Which counters of a request's own have grown, and by how much."""
    names = [f"{told.name}_total" for field, told in COUNTERS.items() if field != "cache_samples"]
    return {name: after[name] - before[name] for name in names if after[name] != before[name]}


async def test_an_epoch_that_was_changed_and_the_write_that_waited_for_it(api):
    session = await api.new_session()
    stores = api.runtime.stores
    before = await scraped(api)

    state = await stores.keeper.read()
    await stores.heartbeat.change(state, next_state(state, cache="off"))
    await api.record(session, "Xin chào")
    after = moved(before, await scraped(api))

    assert after["chat_cache_epoch_changes_total"] >= 1
    assert after["chat_writes_held_total"] >= 1
    assert 0 < after["chat_hold_seconds_total"] <= 2


async def test_a_read_whose_lease_ended_while_redis_answered(api, monkeypatch):
    session = await api.new_session()
    stores = api.runtime.stores
    before = await scraped(api)
    monkeypatch.setattr(stores.lease, "still", lambda state: False)

    await api.contents(session)

    assert moved(before, await scraped(api)) == {"chat_lease_expired_reads_total": 1}


async def test_heartbeats_that_were_missed_and_reads_that_were_served_unverified(api, monkeypatch):
    session = await api.new_session()
    stores = api.runtime.stores
    before = await scraped(api)

    async def out(*_, **__):
        raise DurableStoreUnavailable("cut off")

    monkeypatch.setattr(type(stores.keeper), "read", out)
    monkeypatch.setattr(type(stores.durable), "lookup", out)
    missed = await eventually(api, "chat_heartbeats_missed_total", before["chat_heartbeats_missed_total"] + 6)
    answer = await api.get(f"{session}/history")

    assert answer.headers["X-Cache-Freshness"].startswith("unverified")
    assert missed["chat_cache_trusted"] == missed["chat_lease_seconds_left"] == 0
    assert (await scraped(api))["chat_unverified_reads_total"] == before["chat_unverified_reads_total"] + 1


async def test_a_session_that_was_adopted(api, redis):
    session_id = new_uuid()
    await redis.set(session_key(session_id), guide_value(session_id, "Xin chào"), ex=3600)
    before = await scraped(api)

    assert await api.contents(f"{SESSIONS}/{session_id}") == ["Xin chào"]

    assert (await scraped(api))["chat_sessions_adopted_total"] == before["chat_sessions_adopted_total"] + 1


async def test_the_sampler_of_a_served_process_finds_a_violation_by_itself(settings, redis, monkeypatch):
    monkeypatch.setattr(sampler_module, "SAMPLE_EVERY_SECONDS", 0.05)
    async with open_api(settings, redis_timeout_ms=10_000) as api:
        session = await api.new_session()
        await api.record(session, "Xin chào")
        well = await eventually(api, "chat_cache_samples_total", 3)
        assert well["cache_violations_total"] == 0

        await redis.setrange(key_of(session), FIELDS["chain"][0], "0123456789abcdef")
        found = await eventually(api, "cache_violations_total", 1)

        assert found["cache_violations_total"] == 1
        assert await redis.exists(key_of(session)) == 0
        assert await api.contents(session) == ["Xin chào"]


# How it stands at this moment


async def test_hybrid_mode_with_both_stores(api):
    found = await scraped(api)

    assert {name: value for name, value in found.items() if name.startswith("chat_mode")} == {
        "chat_mode{hybrid}": 1,
        "chat_mode{draining}": 0,
        "chat_mode{redis-only}": 0,
        "chat_mode{postgres}": 0,
    }
    assert (found["chat_store_up{redis}"], found["chat_store_up{postgres}"]) == (1, 1)
    assert found["chat_cache_trusted"] == 1
    assert 0 < found["chat_lease_seconds_left"] <= 1


async def test_without_a_database_there_is_no_coherence_to_tell_of(settings):
    async with open_api(for_mode(settings, "redis-only")) as api:
        found = await scraped(api)

    assert found == {
        "chat_mode{hybrid}": 0,
        "chat_mode{draining}": 0,
        "chat_mode{redis-only}": 1,
        "chat_mode{postgres}": 0,
        "chat_store_up{redis}": 1,
    }


async def test_without_redis_nothing_is_trusted(settings):
    async with open_api(for_mode(settings, "postgres")) as api:
        found = await scraped(api)

    assert (found["chat_mode{postgres}"], found["chat_store_up{postgres}"]) == (1, 1)
    assert found["chat_cache_trusted"] == 0
    assert "chat_store_up{redis}" not in found


async def test_redis_that_is_out_is_down_and_the_rest_is_told(settings):
    async with open_api(settings, redis_url="redis://127.0.0.1:1") as api:
        found = await scraped(api)

    assert (found["chat_store_up{redis}"], found["chat_store_up{postgres}"]) == (0, 1)
    assert found["chat_cache_trusted"] == 0


@pytest.mark.parametrize("outage", [DurableStoreUnavailable("out"), TimeoutError()])
async def test_stores_that_can_not_be_asked_do_not_take_the_counters_with_them(api, monkeypatch, outage):
    async def out(_):
        raise outage

    monkeypatch.setattr(type(api.runtime.store), "health", out)

    found = await scraped(api)

    assert found["cache_violations_total"] == 0
    assert not any(name.startswith("chat_store_up") for name in found)


async def test_a_store_that_hangs_is_not_waited_for_for_ever(api, monkeypatch):
    monkeypatch.setattr(metrics_module, "_ASK_SECONDS_MAX", 0.05)

    async def hang(_):
        await asyncio.sleep(60)

    monkeypatch.setattr(type(api.runtime.store), "health", hang)

    assert "cache_violations_total" in await scraped(api)


# Several workers


async def test_a_worker_tells_of_all_by_their_numbers_and_of_those_that_do_not_answer(api):
    async def ask():
        return {"1": own_metrics(api.app), "2": own_metrics(api.app), "3": None}

    share_metrics(api.app, ask)
    text = (await api.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    workers = {}
    for sample in samples:
        workers.setdefault(sample.name, []).append(sample.labels.get("worker"))

    assert {
        sample.labels["worker"]: sample.value for sample in samples if sample.name == "chat_worker_up"
    } == {
        "1": 1,
        "2": 1,
        "3": 0,
    }
    # The stores were asked once, by the one that answers.
    assert workers.pop("chat_store_up") == [None, None]
    assert workers.pop("chat_worker_up") == ["1", "2", "3"]
    assert {name for one in workers.values() for name in one} == {"1", "2"}
    assert "chat_worker_up" in DOCS.read_text()


# The page


async def test_two_services_in_one_process_have_nothing_in_common(api, settings):
    async with open_api(settings) as other:
        session = await api.new_session()
        await api.contents(session)

        assert (await scraped(api))["chat_cache_hits_total"] == 1
        assert (await scraped(other))["chat_cache_hits_total"] == 0
    assert b"chat_" not in prometheus_client.generate_latest()


async def test_the_format_is_the_one_that_is_asked_for(api):
    plain = await api.get("/metrics")
    open_ = await api.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})

    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert plain.headers["cache-control"] == "no-store"
    assert open_.headers["content-type"].startswith("application/openmetrics-text")
    assert {family.name for family in openmetrics(open_.text)} == {
        family.name for family in text_string_to_metric_families(plain.text)
    }


async def test_it_is_no_part_of_the_api_and_takes_nothing(api):
    described = (await api.get("/openapi.json")).json()

    assert "/metrics" not in described["paths"]
    answer = await api.post("/metrics")
    assert_problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "GET"
