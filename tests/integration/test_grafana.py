"""`deploy/grafana`: every statement of the dashboard, as the account that Grafana is given."""

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import pytest

from app.analytics.rollups import Rollups
from app.postgres.analysts import add_analyst
from app.postgres.store import PostgresChatSessionStore
from app.store import Append
from benchmarks.analytics import panels
from tests.factories import new_message

pytestmark = pytest.mark.anyio

GRAFANA = Path(__file__).parents[2] / "deploy" / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards" / "chat-sessions.json").read_text(encoding="utf-8"))
NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)
STATEMENTS = {
    panel["title"]: target["rawSql"] for panel in DASHBOARD["panels"] for target in panel["targets"]
}
EXPANDED = panels(NOW - timedelta(days=90), NOW)


@pytest.fixture
async def analyst(database, database_url):
    """A connection of an analyst without text, to a database with two chats that are counted."""
    store = PostgresChatSessionStore(database, ttl_seconds=3600)
    for day in (1, 20):
        session = (await store.create_session("an")).session
        at = NOW - timedelta(days=day)
        answered = {"processing_time_ms": 100, "sources": ["luật.md"]}
        await store.append(
            Append(
                session_id=session.session_id,
                messages=(
                    new_message("Có không?", created_at=at),
                    new_message("Có.", role="assistant", created_at=at, metadata=answered),
                ),
            )
        )
        async with database.connection() as conn:
            await conn.execute(
                "UPDATE chat.chat_sessions SET created_at = $2 WHERE session_id = $1", session.session_id, at
            )
    counting = Rollups(database, timezone="Asia/Ho_Chi_Minh")
    while (now := await counting.pending()).marks or now.backfills:
        await counting.round()
    made = await add_analyst(database, "grafana_tests", pii=False)
    server = re.sub(r"//[^@]*@", "//", database_url)
    conn = await asyncpg.connect(server, user="grafana_tests", password=made.password)
    yield conn
    await conn.close()
    async with database.connection() as owner:
        await owner.execute("DROP ROLE grafana_tests")


@pytest.mark.parametrize("title", STATEMENTS)
async def test_every_panel_has_something_to_show(analyst, title):
    sql = EXPANDED[title]

    rows = await analyst.fetch(sql)

    assert "$__" not in sql
    assert rows
    assert any(value is not None for row in rows for value in row.values())


async def test_the_figures_are_those_of_the_range(analyst):
    found = {
        title: (await analyst.fetchrow(EXPANDED[title]))[0]
        for title in ("Sessions", "Active users", "Messages", "Unanswered")
    }

    assert found == {"Sessions": 2, "Active users": 1, "Messages": 4, "Unanswered": 0}


@pytest.mark.parametrize("title", STATEMENTS)
def test_a_panel_reads_roll_ups_and_no_text(title):
    read = set(re.findall(r"(?:FROM|JOIN) ([a-z_]+\.[a-z_0-9]+)", STATEMENTS[title]))

    assert {schema for schema, _, _ in (name.partition(".") for name in read)} == {"analytics"}
    assert not read & {"analytics.messages", "analytics.turns", "analytics.sessions"}


def test_the_dashboard_is_provisioned_as_it_is():
    assert (DASHBOARD["id"], DASHBOARD["uid"]) == (None, "chat-sessions")
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {"${datasource}"}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    source = (GRAFANA / "provisioning" / "datasources" / "chat-sessions.yaml").read_text(encoding="utf-8")
    assert f"uid: {DASHBOARD['templating']['list'][0]['current']['value']}\n" in source
    assert "password: $CHAT_POSTGRES_PASSWORD\n" in source
