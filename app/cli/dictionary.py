"""`chat-sessions dictionary`: what people write SQL against, described."""

import asyncio
import sys

from app.analytics.dictionary import dictionary as page_of
from app.cli.output import refusals_are_lines
from app.cli.targets import command_settings, required_database_url
from app.postgres.schema import require_revision
from app.settings import Settings
from app.wiring import open_database


def dictionary() -> None:
    """Print the data dictionary of schema analytics, in Markdown."""
    with refusals_are_lines():
        settings = command_settings()
        required_database_url(settings)
        sys.stdout.write(asyncio.run(_page(settings)))


async def _page(settings: Settings) -> str:
    async with open_database(settings) as database:
        await require_revision(database)
        return await page_of(database)
