"""`/stores` for whoever looks at it for a while."""

import re

import pytest

from tests.browser.conftest import LOOKS, check_page

pytestmark = pytest.mark.anyio

NOW = re.compile(r"/stores/now\?")


@pytest.mark.parametrize("look", LOOKS, ids=str)
async def test_the_page_is_well_in_every_look(open_page, look):
    page = await open_page("/stores", look)

    await check_page(page, look)
    assert await page.get_by_role("heading", name="PostgreSQL").is_visible()
    assert await page.get_by_role("heading", name="Redis", exact=True).is_visible()


@pytest.fixture
async def watched(open_page):
    """The page under a clock that a test moves, and what it has asked for since."""
    page = await open_page("/stores")
    await page.clock.install()
    await page.reload()
    asked = []
    page.on("request", lambda request: asked.append(request.url) if NOW.search(request.url) else None)
    return page, asked


async def seen_at(page):
    return await page.locator("#now time").get_attribute("datetime")


async def test_the_figures_change_by_themselves(watched):
    page, _ = watched
    for _ in range(2):
        before = await seen_at(page)
        async with page.expect_response(NOW):
            await page.clock.run_for(2_500)
        await page.wait_for_function(
            "(before) => document.querySelector('#now time').dateTime !== before", arg=before
        )


async def test_who_does_not_look_asks_nothing_and_gets_new_figures_when_he_looks_again(watched):
    page, asked = watched
    show = """(state) => {
        Object.defineProperty(document, 'visibilityState', {value: state, configurable: true});
        document.dispatchEvent(new Event('visibilitychange'));
    }"""
    await page.evaluate(show, "hidden")
    await page.clock.run_for(60_000)
    assert asked == []

    async with page.expect_response(NOW):
        await page.evaluate(show, "visible")


@pytest.mark.usefixtures("complaints_expected")
async def test_a_service_that_is_gone_is_said_until_it_is_back(watched):
    page, _ = watched
    note = page.locator("[data-lost]")
    assert await note.is_hidden()
    await page.route(NOW, lambda route: route.abort())
    await page.clock.run_for(2_500)
    await note.wait_for(state="visible")

    await page.unroute(NOW)
    await page.clock.run_for(2_500)
    await note.wait_for(state="hidden")


async def test_a_command_is_copied(open_page):
    page = await open_page("/stores", permissions=["clipboard-read", "clipboard-write"])
    await page.get_by_role("button", name="Copy chat-sessions mode redis-only").click()

    await page.get_by_role("button", name="Copied").wait_for()
    assert await page.evaluate("navigator.clipboard.readText()") == "chat-sessions mode redis-only"


async def test_without_scripts_all_of_it_is_there(open_page):
    page = await open_page("/stores", java_script_enabled=False)

    assert await page.get_by_text("hybrid", exact=True).is_visible()
    assert (await page.locator("#now time").inner_text()).endswith("UTC")
    assert await page.get_by_role("button").count() == 0
