"""What `/stores` says, against what really is; with each store alone, out, and of several workers."""

import re
from datetime import timedelta

import asyncpg
import pytest

from app.api.metrics import own_metrics, share_metrics
from app.chat import utc_now
from app.metrics import Observed
from app.postgres.schema import REVISION
from app.web.stores import Counted, Lately
from tests.contract.suite import until
from tests.databases import migrate, new_database
from tests.integration.api_client import for_mode, open_api
from tests.integration.test_pages import LOOKING, Html

pytestmark = pytest.mark.anyio


async def shown(api, path="/stores"):
    """The words of the page."""
    answer = await api.get(path, headers=LOOKING)
    assert answer.status_code == 200, answer.text
    return Html(answer.text).text


def next_path(html):
    """What the script would ask next."""
    [path] = [attributes["hx-get"] for _, attributes in html.elements if "hx-get" in attributes]
    return path


async def test_both_stores_are_shown_as_they_are(settings, servers, redis):
    async with open_api(settings, redis_timeout_ms=10_000) as api:
        session = await api.new_session()
        await api.record(session, "hello")

        async def trusted():
            await api.get(f"{session}/history")
            return api.runtime.stores.counts.cache_hits > 0

        await until(trusted, seconds=30)
        counts = api.runtime.stores.counts
        text = await shown(api)
        epoch = api.runtime.stores.lease.state.epoch
        version = (await redis.info("server")).get("redis_version")

    assert "Mode Redis trusted hybrid" in text
    assert "PostgreSQL Works Role source of truth" in text
    assert f"Schema revision {REVISION}" in text
    assert f"Epoch {epoch}" in text
    assert "Redis Works Memory" in text
    assert "Sessions held 1" in text
    assert "Keys evicted 0" in text
    assert f"of {counts.cache_hits} reads" in text or f"{counts.cache_hits} of" in text
    assert version
    assert "Counted by this process" in text
    assert "chat-sessions mode redis-only" in text


@pytest.mark.parametrize(
    ("mode", "said", "unsaid"),
    [
        (
            "redis-only",
            ["Mode redis-only", "PostgreSQL Not used", "Redis Works", "has no database"],
            "mode hybrid",
        ),
        (
            "postgres",
            ["Mode postgres", "PostgreSQL Works", "Redis Not used", "has no Redis", "Roll-up lag"],
            "mode redis-only",
        ),
    ],
)
async def test_one_store_alone_is_shown_with_what_it_takes_to_have_both(settings, mode, said, unsaid):
    async with open_api(for_mode(settings, mode)) as api:
        text = await shown(api)

    for words in said:
        assert words in text
    assert f"chat-sessions {unsaid}" not in text


async def test_without_redis_the_page_says_so(settings):
    async with open_api(settings, redis_url="redis://127.0.0.1:1") as api:
        text = await shown(api)

    assert "Redis: Degraded. out, answering from PostgreSQL" in text
    assert "Redis not trusted. Every read is answered by PostgreSQL" in text
    assert "It did not answer in time." in text
    assert "PostgreSQL Works" in text


async def test_without_postgres_the_page_says_so(settings, servers):
    async with new_database(servers, "chat_stores_page") as url:
        await migrate(url)
        async with open_api(settings, database_url=url) as api:
            admin = await asyncpg.connect(servers.database_url)
            try:
                await admin.execute("ALTER DATABASE chat_stores_page ALLOW_CONNECTIONS false")
                await admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'chat_stores_page'"
                )
                text = await shown(api)
            finally:
                await admin.execute("ALTER DATABASE chat_stores_page ALLOW_CONNECTIONS true")
                await admin.close()

    assert "PostgreSQL: Degraded. out" in text
    assert "Schema revision No answer" in text
    assert "Redis Works" in text


async def test_of_several_workers_all_are_counted_and_those_that_are_silent_are_named(settings):
    async with open_api(settings) as api:

        async def ask():
            one = own_metrics(api.app)
            two = own_metrics(api.app)
            one["counts"] = {**one["counts"], "cache_fills": 1200, "cache_violations": 1}
            two["counts"] = {**two["counts"], "cache_fills": 34}
            return {"1": one, "2": two, "3": None}

        share_metrics(api.app, ask)
        text = await shown(api)

    assert "2 of 3 answer" in text
    assert "Filled from PostgreSQL 1,234" in text
    assert "3 does not answer" in text
    # The one that stands for the guarantee.
    assert "Drift: 1. Trusted entries were not what PostgreSQL has" in text


async def test_what_changes_is_asked_for_alone_with_what_was_seen(settings):
    async with open_api(settings) as api:
        answer = await api.get("/stores", headers=LOOKING)
        fragment = await api.get(next_path(Html(answer.text)), headers=LOOKING)
        html = Html(fragment.text)

    assert html.of("html") == []
    assert "no reads now" in html.text
    assert re.fullmatch(r"/stores/now\?since=\d+\.0\.0", next_path(html))


@pytest.mark.parametrize("since", ["", "1", "1.2", "1.2.x", "1.2.3.4", "-1.2.3", f"{10**16}.1.1"])
async def test_an_earlier_look_that_is_none_is_refused_by_name(settings, since):
    async with open_api(settings) as api:
        answer = await api.get("/stores/now", params={"since": since}, headers=LOOKING)

    assert answer.status_code == 422
    assert "query.since" in answer.text


def counted(**counts):
    return Counted(processes={"": Observed(mode="hybrid", counts=counts)})


def test_what_happened_between_two_looks():
    now = utc_now()
    at = round((now - timedelta(seconds=2)).timestamp() * 1000)
    found = Lately.between(f"{at}.10.20", now, counted(cache_hits=40, cache_fills=20, cache_validations=10))

    assert found is not None
    assert (found.hits, found.reads, round(found.seconds)) == (30, 50, 2)


@pytest.mark.parametrize("since", ["9.9", "5.10", "1.6"])
def test_counts_that_began_anew_are_not_compared(since):
    """A worker was replaced: the sums are lower than they were, or hits grew more than reads."""
    assert Lately.between(f"1000.{since}", utc_now(), counted(cache_hits=5, cache_fills=1)) is None
