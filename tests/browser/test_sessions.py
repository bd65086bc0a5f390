"""`/sessions` and transcripts in a browser: found by words, led to the message, read back, deleted."""

import httpx
import pytest

from tests.browser.conftest import LOOKS, check_page

pytestmark = pytest.mark.anyio

#: Scripts, an override of the direction, a line without an end, and marks upon marks.
HOSTILE = "<script>document.title='owned'</script>\u202egnp.exe " + "W" * 20_000 + "Z\u0300\u0301\u0302" * 50


@pytest.fixture(scope="module")
async def client(server):
    async with httpx.AsyncClient(base_url=f"{server}/api/chat", trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
async def session(client):
    """A session of 120 messages, the newest ones hostile."""
    made = await client.post("/sessions", params={"user_id": "Người dùng có tên rất dài " * 9})
    path = f"/sessions/{made.json()['session_id']}"
    for first in (1, 61):
        messages = [
            {
                "role": "user" if seq % 2 else "assistant",
                "content": f"Điều kiện số {seq}?" if seq < 119 else HOSTILE,
                "metadata": {}
                if seq % 2
                else {"processing_time_ms": 1200, "sources": ["Điều 5", HOSTILE[:200]]},
            }
            for seq in range(first, first + 60)
        ]
        answer = await client.post(f"{path}/history", json={"messages": messages})
        assert answer.status_code == 200, answer.text
    return path


@pytest.mark.parametrize("look", LOOKS, ids=str)
@pytest.mark.parametrize("query", ["", "?words=dieu+kien", "?user_id=nobody"], ids=["all", "words", "none"])
async def test_the_list_is_well_in_every_look(open_page, session, look, query):
    page = await open_page(f"/sessions{query}", look)

    await check_page(page, look)


@pytest.mark.parametrize("look", LOOKS, ids=str)
@pytest.mark.parametrize("query", ["", "?at=60#m-60"], ids=["newest", "around"])
async def test_a_transcript_is_well_in_every_look(open_page, session, look, query):
    page = await open_page(f"{session}{query}", look)

    await check_page(page, look)
    assert await page.title() == "Session · Chat sessions"
    assert await page.locator("article.message").count() == 50


async def test_words_lead_to_the_message_and_back_through_the_pages(open_page, session):
    page = await open_page("/sessions")
    await page.get_by_label("Words in messages").fill('"dieu kien so 30"')
    await page.get_by_role("button", name="Find").click()
    await page.locator(".hits a").first.click()

    assert page.url.endswith("?at=30#m-30")
    assert await page.locator(".message-marked .message-text").inner_text() == "Điều kiện số 30?"
    await page.get_by_role("link", name="Newer messages").click()
    await page.locator("#m-104").wait_for()
    await page.get_by_role("link", name="Older messages").click()
    await page.locator("#m-5").wait_for()


async def seqs(page):
    return await page.locator("article.message").evaluate_all(
        "(all) => all.map((one) => Number(one.id.slice(2)))"
    )


async def test_older_messages_come_above_and_what_is_read_stays_where_it_is(open_page, session):
    page = await open_page(session)
    address = page.url
    assert await seqs(page) == list(range(71, 121))
    for first, read in ((21, 71), (1, 21)):
        message = page.locator(f"#m-{read}")
        older = page.get_by_role("link", name="Older messages")
        await older.scroll_into_view_if_needed()
        before = (await message.bounding_box())["y"]
        await older.focus()
        await page.keyboard.press("Enter")
        await page.locator(f"#m-{first}").wait_for()

        assert await seqs(page) == list(range(first, 121))
        assert abs((await message.bounding_box())["y"] - before) < 1
    assert page.url == address
    assert await page.locator("#m-1 time").inner_text() != await page.locator("#m-1 time").get_attribute(
        "title"
    )
    await page.locator("#m-33 a.message-seq").click()
    assert page.url.endswith("?at=33#m-33")
    assert await page.locator(".message-marked").get_attribute("id") == "m-33"


async def test_the_keyboard_stays_on_the_way_to_older_messages(open_page, session):
    page = await open_page(session)
    await page.get_by_role("link", name="Older messages").focus()
    await page.keyboard.press("Enter")
    await page.locator("#m-21").wait_for()

    assert await page.evaluate("document.activeElement.id") == "older"


async def test_without_scripts_older_messages_are_a_page_of_their_own(open_page, session):
    page = await open_page(session, java_script_enabled=False)
    await page.get_by_role("link", name="Older messages").click()

    await page.locator("#m-21").wait_for()
    assert "?before=71" in page.url


async def test_a_click_for_another_tab_opens_one(open_page, session):
    page = await open_page(session)
    async with page.context.expect_page() as opened:
        await page.get_by_role("link", name="Older messages").click(modifiers=["Control"])
    other = await opened.value

    await other.locator("#m-21").wait_for()
    assert await seqs(page) == list(range(71, 121))


@pytest.mark.usefixtures("complaints_expected")
async def test_where_older_messages_can_not_be_had_the_page_says_why(open_page, client):
    made = (await client.post("/sessions", params={"user_id": "goes"})).json()["session_id"]
    body = {"messages": [{"role": "user", "content": str(seq)} for seq in range(60)]}
    await client.post(f"/sessions/{made}/history", json=body)
    page = await open_page(f"/sessions/{made}")
    await client.delete(f"/sessions/{made}")
    await page.get_by_role("link", name="Older messages").click()

    await page.get_by_role("heading", name="There is nothing here").wait_for()


async def test_the_time_to_live_counts_down(open_page, session):
    page = await open_page(session)
    await page.clock.install()
    await page.reload()
    left = page.locator("[data-countdown]")
    before = int(await left.get_attribute("data-countdown"))
    await page.clock.run_for(65_000)

    minutes, seconds = (await left.inner_text()).split(":")
    assert before - 70 <= 60 * int(minutes) + int(seconds) <= before - 64


async def test_a_session_is_deleted_after_a_question(open_page, client):
    made = (await client.post("/sessions", params={"user_id": "goes"})).json()["session_id"]
    page = await open_page(f"/sessions/{made}")
    await page.get_by_role("link", name="Delete").click()
    await page.get_by_role("link", name="Keep it").click()
    assert (await client.get(f"/sessions/{made}")).status_code == 200
    await page.get_by_role("link", name="Delete").click()
    await page.get_by_role("button", name="Delete for good").click()

    await page.get_by_text("Deleted for good:").wait_for()
    assert (await client.get(f"/sessions/{made}")).status_code == 404


async def test_a_transcript_can_be_read_by_keyboard_alone(open_page, session):
    page = await open_page(session)
    await page.keyboard.press("Tab")
    assert await page.evaluate("document.activeElement.className") == "skip"
    await page.keyboard.press("Enter")
    assert await page.evaluate("document.activeElement.id") == "main"
    for _ in range(12):
        await page.keyboard.press("Tab")
        assert await page.evaluate("document.activeElement.matches(':focus-visible')")
