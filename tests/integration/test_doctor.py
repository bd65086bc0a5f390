"""What the doctor says of the coherence: the cache, who serves, and which Redis is trusted."""

import pytest

from app.cli.doctor import _connections, _examine
from app.coherence.ports import PROTOCOL
from app.postgres.cache_state import claim_state
from app.settings import Settings
from tests.stores import trust

pytestmark = pytest.mark.anyio

_INSTANCE = """
INSERT INTO chat.instances (instance_id, version, protocol, started_at, last_seen)
VALUES (gen_random_uuid(), $1, $2, now(), now() - make_interval(secs => $3))
"""


@pytest.fixture
async def examined(servers, database, database_url, settings, state_of_the_services):
    """Changes the state and the services as told; then subject -> status of what the doctor finds."""

    async def examine(*instances, **columns):
        async with database.connection() as conn:
            for name, value in columns.items():
                await conn.execute(f"UPDATE chat.cache_state SET {name} = $1", value)
            for version, protocol, seconds_ago in instances:
                await conn.execute(_INSTANCE, version, protocol, seconds_ago)
        return {one.subject: one for one in await _examine(settings)}

    return examine


@pytest.fixture
async def state_of_the_services(servers, database, settings):
    """`settings` leaves none: a first start would claim the database."""
    await claim_state(database, redis_only=None)
    return await trust(database, servers.redis_url)


HERE = ("1.0", PROTOCOL, 0)


async def test_a_trusted_redis_and_one_version_are_well(examined):
    found = await examined(HERE, HERE)

    assert [found[name].status for name in ("cache", "instances", "redis identity")] == ["pass"] * 3
    assert found["instances"].finding == f"2 alive, version 1.0, protocol {PROTOCOL}"


async def test_a_cache_that_is_off_is_a_warning_with_advice(examined):
    served = await examined(HERE, cache="off")

    assert served["cache"].status == "warn"
    assert "turns the cache on again by itself" in served["cache"].advice
    assert "redis identity" not in served


async def test_a_cache_that_is_off_while_nobody_serves_waits_for_a_start(examined):
    found = await examined(cache="off")

    assert found["cache"].advice.startswith("start the service")
    assert (found["instances"].status, found["instances"].finding) == ("pass", "no service runs")


async def test_in_redis_only_mode_there_is_no_cache_to_speak_of(examined):
    found = await examined(HERE, mode="redis-only", cache="off")

    assert not {"cache", "redis identity"} & set(found)


async def test_another_redis_than_the_services_trust_is_a_failure_only_while_they_run(examined):
    alone = await examined(redis_identity="another/redis")
    served = await examined(HERE)

    assert alone["redis identity"].status == "pass"
    assert served["redis identity"].status == "fail"
    assert "REDIS_URL" in served["redis identity"].advice


async def test_versions_side_by_side_are_a_warning_and_protocols_a_failure(examined):
    versions = await examined(HERE, ("1.1", PROTOCOL, 0))
    protocols = await examined(("2.0", PROTOCOL + 1, 0))

    assert versions["instances"].status == "warn"
    assert protocols["instances"].status == "fail"


async def test_a_service_that_was_not_heard_from_lately_does_not_count(examined):
    found = await examined(("0.9", PROTOCOL, 60), HERE)

    assert found["instances"].finding == f"1 alive, version 1.0, protocol {PROTOCOL}"


async def test_a_database_of_another_protocol_is_a_failure(examined):
    found = await examined(protocol=PROTOCOL + 1)

    assert found["protocol"].status == "fail"


@pytest.mark.parametrize(("workers", "status", "sum_"), [(1, "pass", 12), (8, "pass", 96), (9, "warn", 108)])
def test_the_connections_of_all_workers_together_must_fit(workers, status, sum_):
    """Ten of a worker's pool, and two of its pulse."""
    settings = Settings(_env_file=None, workers=workers, database_pool_size=10)

    found = _connections(settings, 100, 3)

    assert found.status == status
    assert found.finding.startswith(f"WORKERS={workers} use up to {sum_} (12 each) of max_connections = 100,")
    assert ("WORKERS" in found.advice) == (status == "warn")
