"""`/` for whoever talks there."""

from uuid import UUID

import asyncpg
import pytest
from redis.asyncio import Redis

from tests.browser.conftest import LOOKS, check_page

pytestmark = pytest.mark.anyio

HOSTILE = "<img src=x onerror=document.title='owned'>\u202e" + "x" * 5_000
MESSAGES = "**/api/chat/sessions/*/messages?*"


async def say(page, text):
    await page.get_by_role("textbox", name="Your message").fill(text)
    await page.keyboard.press("Enter")


async def said(page):
    """What the service has of the session in the address."""
    session = page.url.rpartition("session=")[2]
    answer = await page.request.get(f"/api/chat/sessions/{session}/history")
    return [one["content"] for one in (await answer.json())["messages"]]


@pytest.mark.parametrize("look", LOOKS, ids=str)
async def test_the_page_is_well_in_every_look(open_page, look):
    page = await open_page("/?user=look", look)
    await check_page(page, look)

    await say(page, HOSTILE)
    await page.get_by_text("Sources: 2").wait_for()
    await check_page(page, look)
    assert await page.title() == "Chat · Chat sessions"
    assert await page.locator("#transcript img").count() == 0


async def test_an_answer_that_shows_is_in_both_stores(open_page, server_settings):
    page = await open_page("/?user=both")
    await say(page, "Xin chào")
    await page.get_by_text("heard: Xin chào").wait_for()
    session = UUID(page.url.rpartition("session=")[2])

    database = await asyncpg.connect(str(server_settings.database_url).replace("+asyncpg", ""))
    try:
        assert (
            await database.fetchval("select count(*) from chat.chat_messages where session_id = $1", session)
            == 2
        )
    finally:
        await database.close()
    async with Redis.from_url(server_settings.redis_url, db=1) as redis:
        assert [key async for key in redis.scan_iter(match=f"*{session}*")]


@pytest.mark.usefixtures("complaints_expected")
async def test_what_was_cut_off_after_it_was_stored_is_sent_again_and_not_doubled(open_page):
    page = await open_page("/?user=cut")

    async def cut(route):
        await route.fetch()
        await route.abort()

    await page.route(MESSAGES, cut)
    await say(page, "once")
    await page.get_by_text("The service can't be reached.").wait_for()
    await page.unroute(MESSAGES)
    await page.get_by_role("button", name="Send again").dblclick()
    await page.get_by_text("heard: once").wait_for()

    assert await said(page) == ["once", "heard: once"]


async def test_two_enters_are_one_message_and_shift_enter_breaks_the_line(open_page):
    page = await open_page("/?user=twice")
    box = page.get_by_role("textbox", name="Your message")
    await box.fill("a")
    await page.keyboard.press("Shift+Enter")
    await page.keyboard.type("b")
    await page.keyboard.press("Enter")
    await page.keyboard.press("Enter")
    await page.get_by_text("heard: a").wait_for()

    assert await said(page) == ["a\nb", "heard: a\nb"]
    assert await box.evaluate("(one) => one === document.activeElement")


async def test_without_scripts_the_transcript_is_there_and_nothing_can_be_sent(open_page):
    page = await open_page("/?user=reads")
    await say(page, "hello")
    await page.get_by_text("heard: hello").wait_for()

    page = await open_page(page.url, java_script_enabled=False)
    assert await page.get_by_text("heard: hello").is_visible()
    assert await page.get_by_role("textbox", name="Your message").is_disabled()
    assert await page.locator("noscript").count() == 1
