"""`/analytics` in a browser: charts are drawn, in both themes, and the range is kept in the address."""

import json

import httpx
import pytest

from tests.browser.conftest import LOOKS, check_page
from tests.contract.suite import until

pytestmark = pytest.mark.anyio

LONG = "Nghị định 24/2024/NĐ-CP " * 12


@pytest.fixture(scope="module")
async def counted(server):
    """A session whose answer names its sources, in the roll-ups."""
    async with httpx.AsyncClient(base_url=f"{server}/api", trust_env=False) as client:
        made = await client.post("/chat/sessions", params={"user_id": "n" * 200})
        answer = {
            "role": "assistant",
            "content": "Có ba.",
            "metadata": {"processing_time_ms": 900, "sources": [LONG]},
        }
        messages = {"messages": [{"role": "user", "content": "Điều kiện?"}, answer]}
        await client.post(f"/chat/sessions/{made.json()['session_id']}/history", json=messages)

        async def is_counted():
            return bool((await client.get("/analytics/top_sources")).json()["rows"])

        await until(is_counted, seconds=30)


@pytest.mark.parametrize("look", LOOKS, ids=str)
async def test_the_page_is_well_in_every_look(open_page, counted, look):
    page = await open_page("/analytics", look)
    await page.locator("figure.chart canvas").first.wait_for()

    await check_page(page, look)
    assert await page.locator("figure.chart canvas").count() == 4
    for chart in await page.locator("figure.chart .u-legend").all():
        assert await chart.locator("th").count() >= 3


async def test_charts_share_the_time_axis_of_the_range(open_page, counted):
    """One with a single point, too: by itself it would be drawn over years."""
    page = await open_page("/analytics?days=7&granularity=day")
    await page.locator("figure.chart canvas").first.wait_for()
    told = await page.locator("figure.chart script").all_text_contents()
    assert [len(json.loads(one)["times"]) for one in told] == [7, 7, 1, 1]

    single = page.locator("figure.chart .u-over").nth(2)
    await single.scroll_into_view_if_needed()
    box = await single.bounding_box()
    await single.hover(position={"x": box["width"] - 2, "y": box["height"] / 2})
    pointed = await page.locator("figure.chart .u-legend").nth(2).locator(".u-value").first.inner_text()
    today = await page.locator("figure.chart .u-legend").nth(0).locator(".u-value").first.inner_text()
    assert pointed == today != "–"
    shown = await single.locator(".u-cursor-pt").nth(0).bounding_box()
    assert shown["x"] > box["x"] + 0.9 * box["width"]


async def test_a_click_on_a_range_is_in_the_address_and_in_what_is_shown(open_page, counted):
    page = await open_page("/analytics?granularity=day")
    await page.get_by_role("link", name="7 days").click()

    assert page.url.endswith("/analytics?granularity=day&days=7")
    assert await page.get_by_role("link", name="7 days").get_attribute("aria-current") == "true"
    assert await page.get_by_label("Periods").input_value() == "day"


async def test_the_form_keeps_what_was_chosen_and_may_be_left_empty(open_page, counted):
    page = await open_page("/analytics?days=7")
    await page.get_by_label("Time zone").fill("Asia/Ho_Chi_Minh")
    await page.get_by_role("button", name="Show").click()

    await page.get_by_text("days of Asia/Ho_Chi_Minh").wait_for()
    assert await page.get_by_role("link", name="7 days").get_attribute("aria-current") == "true"


async def test_the_numbers_of_a_chart_can_be_read(open_page, counted):
    page = await open_page("/analytics?days=7")
    traffic = page.get_by_role("region", name="Messages and sessions").first
    await (
        page.locator("section", has=page.get_by_role("heading", name="Messages and sessions"))
        .get_by_text("Numbers")
        .click()
    )

    assert await traffic.locator("tbody tr").count() >= 7


async def test_the_theme_may_change_while_it_is_looked_at(open_page, counted):
    page = await open_page("/analytics")
    await page.locator("figure.chart canvas").first.wait_for()
    await page.emulate_media(color_scheme="dark")

    await page.wait_for_function("document.querySelectorAll('figure.chart canvas').length === 4")
