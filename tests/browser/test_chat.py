"""`/` for whoever talks there."""

import asyncio
from uuid import UUID

import asyncpg
import pytest
from redis.asyncio import Redis

from app.web.languages import Language
from tests.browser.conftest import LOOKS, PHONE, check_page
from tests.integration.api_client import serving

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
    page = await open_page("/?user_id=look", look)
    await check_page(page, look)

    await say(page, HOSTILE)
    await page.get_by_text("Sources: 2").wait_for()
    await check_page(page, look)
    assert await page.title() == "Chat · Chat sessions"
    assert await page.locator("#transcript img").count() == 0


async def test_an_answer_that_shows_is_in_both_stores(open_page, server_settings):
    page = await open_page("/?user_id=both")
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
    page = await open_page("/?user_id=cut")

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
    page = await open_page("/?user_id=twice")
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
    page = await open_page("/?user_id=reads")
    await say(page, "hello")
    await page.get_by_text("heard: hello").wait_for()

    page = await open_page(page.url, java_script_enabled=False)
    assert await page.get_by_text("heard: hello").is_visible()
    assert await page.get_by_role("textbox", name="Your message").is_disabled()
    assert await page.locator("noscript").count() == 1


@pytest.fixture
async def failing(browser, server_settings):
    """A page of a service whose assistant fails the first time."""
    with serving(server_settings, assistant="fails_once") as port:
        context = await browser.new_context(base_url=f"http://127.0.0.1:{port}")
        yield await context.new_page()
        await context.close()


@pytest.fixture
async def suggesting(browser, server_settings):
    """A page of a service whose assistant has something to suggest."""
    with serving(server_settings, assistant="suggests") as port:
        context = await browser.new_context(base_url=f"http://127.0.0.1:{port}", viewport=PHONE)
        yield await context.new_page()
        await context.close()


async def test_what_is_suggested_is_asked_by_one_click(suggesting):
    await suggesting.goto("/?user_id=begins")
    await check_page(suggesting, "suggestions")
    await suggesting.get_by_role("button", name="What is there about “<b>two</b>”?").click()
    await suggesting.get_by_text("heard: What is there about").wait_for()

    assert (await said(suggesting))[0] == "What is there about “<b>two</b>”?"
    assert await suggesting.locator(".suggestions").count() == 0


async def test_a_failed_answer_is_shown_for_what_it_is_and_asked_for_again(failing):
    await failing.goto("/?user_id=fails")
    await say(failing, "once")
    failure = failing.locator(".message-failed .failure")
    await failure.wait_for()
    assert "the assistant failed" in (await failure.inner_text()).lower()
    assert await said(failing) == ["once"]

    await failing.get_by_role("button", name="Send again").click()
    await failing.get_by_text("heard: once").wait_for()
    assert await failing.locator(".failure").count() == 0
    assert await said(failing) == ["once", "heard: once"]


async def test_a_slow_answer_says_how_long_it_has_been_thought_about(open_page):
    page = await open_page("/?user_id=slow")
    await page.clock.install()
    answer = asyncio.Event()

    async def late(route):
        await answer.wait()
        await route.continue_()

    await page.route(MESSAGES, late)
    await say(page, "slow")
    await page.get_by_text("Thinking…").wait_for()
    await page.clock.run_for(7_000)
    await page.get_by_text("Still thinking, for 7 s…").wait_for()
    assert await page.get_by_role("button", name="Send").is_disabled()
    answer.set()
    await page.get_by_text("heard: slow").wait_for()
    assert not await page.get_by_text("Still thinking").is_visible()


@pytest.mark.parametrize("code", ["en", "vi"])
@pytest.mark.parametrize("took_ms", [0, 1, 850, 3_500, 12_300])
async def test_the_script_says_how_long_an_answer_took_as_the_page_does(open_page, code, took_ms):
    page = await open_page(f"/?user_id=took&lang={code}")

    async def took(route):
        answer = await route.fetch()
        await route.fulfill(response=answer, json={**await answer.json(), "processing_time_ms": took_ms})

    await page.route(MESSAGES, took)
    await page.locator("#message").fill("how long")
    await page.keyboard.press("Enter")
    await page.get_by_text("heard: how long").wait_for()

    language = Language(code)
    said = language.text("message.took", time=language.duration(took_ms / 1000))
    assert await page.locator(".message-facts").last.text_content() == said


async def test_the_enter_of_an_input_method_chooses_a_word_and_sends_nothing(open_page):
    page = await open_page("/?user_id=ime")
    box = page.get_by_role("textbox", name="Your message")
    await box.fill("Điều ki")
    await box.dispatch_event("keydown", {"key": "Enter", "isComposing": True})

    assert await box.input_value() == "Điều ki"
    assert await page.locator("article.message").count() == 0


async def test_a_session_that_was_just_begun_stands_at_the_side_and_can_be_left_and_found_again(open_page):
    page = await open_page("/?user_id=side")
    assert await page.get_by_text("None yet.").is_visible()
    await say(page, "first")
    await page.locator("#past a[aria-current]").get_by_text("2 messages").wait_for()
    await page.get_by_role("link", name="New chat").click()
    assert await page.get_by_text("Ask something").is_visible()
    await page.locator("#past a").first.click()
    await page.get_by_text("heard: first").wait_for()


async def test_on_a_phone_past_sessions_are_folded_and_the_box_is_in_reach(open_page):
    page = await open_page("/?user_id=phone", LOOKS[1])
    await say(page, "hello")
    await page.get_by_text("heard: hello").wait_for()

    assert not await page.locator("#past").is_visible()
    box = await page.get_by_role("textbox", name="Your message").bounding_box()
    assert box["y"] + box["height"] <= 844
