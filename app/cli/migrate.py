"""`chat-sessions migrate`: the schema, brought to what this version needs."""

from app.cli.output import refusals_are_lines
from app.cli.targets import command_settings, required_database_url, revision_of
from app.postgres.schema import REVISION, upgrade


def migrate() -> None:
    """Bring the database's schema to this version. The same as `alembic upgrade head`; safe to repeat."""
    with refusals_are_lines():
        url = required_database_url(command_settings())
        before = revision_of(url)
        upgrade(url)
        print(
            f"schema revision {REVISION}"
            + (", as before" if before == REVISION else f", was {before or 'none'}")
        )
