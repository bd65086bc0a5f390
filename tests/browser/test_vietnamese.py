"""The pages in Vietnamese: no word of ours is left in English."""

import re

import httpx
import pytest

from app.web.frame import PLACES
from app.web.texts import TEXTS
from tests.browser.conftest import LOOKS, check_page

pytestmark = pytest.mark.anyio

# What people see or hear, but for what has no translation: what somebody said or is called, what a program says or is
# told (code, English), times, and figures with their units.
WORDS = """() => {
  const theirs = ".command, bdi, code, pre, time, .mono, .said, .message-text, .u-legend .u-value, [lang=en]";
  const found = [];
  const walker = document.createTreeWalker(document.documentElement, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const parent = node.parentElement;
    if (!parent.closest("script, style, template, noscript") && !parent.closest(theirs)) found.push(node.data);
  }
  for (const one of document.querySelectorAll("[aria-label], [placeholder], [title]")) {
    if (one.closest(theirs)) continue;
    for (const name of ["aria-label", "placeholder", "title"]) found.push(one.getAttribute(name) ?? "");
  }
  return found
    .flatMap((one) => one.split(" · "))
    .map((one) => one.trim().replace(/\\s+/g, " "))
    .filter((one) => /\\p{L}/u.test(one));
}"""


def patterns(texts):
    """What texts can be once their values are filled in. Those that are little else say nothing."""
    filled = [re.sub(r"\\\{\w+\\\}", ".*", re.escape(text)) for text in texts if has_words(text)]
    return re.compile("|".join(filled))


def has_words(text):
    return len(re.findall(r"\w", re.sub(r"\{\w+\}", "", text))) > 3


ENGLISH = patterns(english for english, vietnamese in TEXTS.values() if english != vietnamese)
VIETNAMESE = patterns(vietnamese for _, vietnamese in TEXTS.values())

#: A sentence without one accent is no Vietnamese.
ENGLISH_SENTENCE = re.compile(r"(?=(?:.*\b[A-Za-z]{2,}\b){4})[ -~]+")


def is_english(words):
    return not VIETNAMESE.fullmatch(words) and (ENGLISH.fullmatch(words) or ENGLISH_SENTENCE.fullmatch(words))


@pytest.fixture(scope="module")
async def session(server):
    async with httpx.AsyncClient(base_url=f"{server}/api/chat", trust_env=False) as client:
        made = (await client.post("/sessions", params={"user_id": "Lan"})).json()["session_id"]
        for _ in range(2):
            answer = await client.post(f"/sessions/{made}/messages", json={"message": "điều kiện?"})
            assert answer.status_code == 200, answer.text
    return made


@pytest.mark.parametrize("look", [LOOKS[0], LOOKS[3]], ids=str)
@pytest.mark.parametrize(
    "path",
    [
        *PLACES.values(),
        "/sessions?words=dieu+kien",
        "/sessions/{session}",
        "/sessions/{session}/delete",
        "/?user_id=Lan&session={session}",
    ],
)
async def test_no_word_of_a_page_is_left_in_english(open_page, session, path, look):
    page = await open_page(path.format(session=session), look, locale="vi")

    await check_page(page, look)
    assert await page.locator("html").get_attribute("lang") == "vi"
    words = await page.evaluate(WORDS)
    assert len(words) > 10
    assert list(filter(is_english, words)) == []
