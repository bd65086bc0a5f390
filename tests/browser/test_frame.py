"""What the frame of all pages does for a reader: keyboard, languages, times, errors."""

import pytest

from tests.browser.conftest import LOOKS, check_page

pytestmark = pytest.mark.anyio


@pytest.mark.usefixtures("complaints_expected")
@pytest.mark.parametrize("look", LOOKS, ids=str)
async def test_an_error_is_a_page_like_any_other(open_page, look):
    """The browser itself complains of the status."""
    page = await open_page("/nothing", look)

    await check_page(page, look)
    assert await page.get_by_role("heading", level=1).inner_text() == "There is nothing here"


async def test_the_first_key_leads_past_the_header(open_page):
    page = await open_page("/stores")
    await page.keyboard.press("Tab")

    link = page.locator(":focus")
    assert await link.inner_text() == "Skip to the content"
    assert (await link.bounding_box())["y"] >= 0
    await page.keyboard.press("Enter")
    assert await page.locator(":focus").get_attribute("id") == "main"


async def test_what_has_the_focus_is_outlined(open_page):
    page = await open_page("/stores")
    for _ in range(3):
        await page.keyboard.press("Tab")
        style = await page.locator(":focus").evaluate("(one) => getComputedStyle(one).outlineStyle")
        assert style == "solid"


async def test_a_language_that_was_chosen_stays(open_page):
    page = await open_page("/stores")
    await page.get_by_role("link", name="Tiếng Việt").click()
    await page.get_by_role("heading", level=1, name="Kho dữ liệu").wait_for()

    await page.goto("/stores")
    assert await page.get_by_role("heading", level=1).inner_text() == "Kho dữ liệu"


async def test_times_are_those_of_the_reader_and_keep_utc_in_their_title(open_page):
    page = await open_page("/stores", timezone_id="Asia/Ho_Chi_Minh")
    time = page.locator("time").first
    hour = int((await time.get_attribute("datetime"))[11:13])

    assert (await time.inner_text())[:2] == f"{(hour + 7) % 24:02}"
    assert (await time.get_attribute("title")).endswith("UTC")


async def test_colours_follow_the_readers_scheme(open_page):
    light, dark = [
        await (await open_page("/stores", look)).evaluate("getComputedStyle(document.body).backgroundColor")
        for look in (LOOKS[0], LOOKS[2])
    ]
    assert light != dark
