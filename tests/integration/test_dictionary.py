"""The data dictionary in the documentation is the one that the database has."""

from pathlib import Path

import pytest

from app.analytics.dictionary import dictionary
from app.postgres.engine import Database

pytestmark = pytest.mark.anyio

PAGE = Path(__file__).parents[2] / "docs" / "data-dictionary.md"


async def test_the_page_is_what_the_database_says(database: Database) -> None:
    """Else: `chat-sessions dictionary > docs/data-dictionary.md`."""
    assert PAGE.read_text(encoding="utf-8") == await dictionary(database)


async def test_every_view_every_column_and_every_function_is_described(database: Database) -> None:
    async with database.connection() as conn:
        silent = await conn.fetch(
            "SELECT c.relname, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND attnum > 0 "
            "WHERE c.relnamespace = 'analytics'::regnamespace AND c.relkind = 'v' "
            "AND (obj_description(c.oid, 'pg_class') IS NULL OR col_description(c.oid, attnum) IS NULL) "
            "UNION ALL SELECT proname, NULL FROM pg_proc "
            "WHERE pronamespace = 'analytics'::regnamespace AND obj_description(oid, 'pg_proc') IS NULL"
        )

    assert silent == []


async def test_views_over_roll_ups_have_a_security_barrier(database: Database) -> None:
    """The other three show whole rows: there is nothing that they could leak."""
    async with database.connection() as conn:
        without = await conn.fetch(
            "SELECT relname FROM pg_class WHERE relnamespace = 'analytics'::regnamespace AND relkind = 'v' "
            "AND NOT coalesce(reloptions @> ARRAY['security_barrier=true'], false) ORDER BY 1"
        )

    assert [record[0] for record in without] == ["messages", "sessions", "turns"]
