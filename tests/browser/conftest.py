"""A real Chromium, and what every page must be in it."""

import os
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.async_api import Browser, Page, async_playwright

from tests.integration.api_client import empty_stores, serving

AXE = next(Path(__file__).parent.glob("axe-core-*/axe.min.js"))

#: No calls of its own to anybody, and nothing that a container lacks.
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@dataclass(frozen=True)
class Look:
    """How somebody looks at a page."""

    scheme: str = "light"
    size: str = "desktop"

    def __str__(self):
        return f"{self.scheme}-{self.size}"


#: Every page is checked in all of them.
LOOKS = [Look(scheme, size) for scheme in ("light", "dark") for size in ("desktop", "phone")]


@pytest.fixture(scope="session")
async def browser(anyio_backend) -> AsyncIterator[Browser]:
    """Chromium of CHROMIUM, else of PATH. Without one the test is skipped, or fails where CHROMIUM_REQUIRED is set."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if path is None:
        reason = "there is no chromium: apt-get install chromium, or set CHROMIUM to its path"
        if os.environ.get("CHROMIUM_REQUIRED"):
            pytest.fail(reason)
        pytest.skip(reason)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        await browser.close()


@pytest.fixture(scope="module")
async def server_settings(servers, database_url):
    """Both stores, empty."""
    return await empty_stores(servers, database_url)


@pytest.fixture(scope="module")
def server(server_settings) -> Iterator[str]:
    """The service behind a real socket, one for a file of tests; gives its address."""
    with serving(server_settings) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
async def open_page(browser, server, request):
    """Opens a page of the service in a context of its own, which is given an address and a look.

    At the end no page may have complained in its console, or asked another host for anything. A test that breaks
    something is marked `@pytest.mark.usefixtures("complaints_expected")`. More arguments are those of a context.
    """
    contexts, complaints = [], []

    async def open_it(path: str, look: Look = LOOKS[0], **options) -> Page:
        context = await browser.new_context(
            base_url=server,
            color_scheme=look.scheme,
            viewport=PHONE if look.size == "phone" else DESKTOP,
            locale=options.pop("locale", "en"),
            **options,
        )
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = await context.new_page()
        page.on(
            "console",
            lambda said: complaints.append(said.text) if said.type in {"error", "warning"} else None,
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda asked: complaints.append(asked.url) if not asked.url.startswith(f"{server}/") else None,
        )
        await page.goto(path)
        return page

    yield open_it
    for context in contexts:
        await context.close()
    if "complaints_expected" not in request.fixturenames:
        assert complaints == []


@pytest.fixture
def complaints_expected():
    """For a test that breaks something: the browser says so in its console."""


async def check_page(page: Page, look: Look) -> None:
    """What holds for every page: nothing that axe-core calls serious, nothing wider than the window."""
    await page.evaluate(AXE.read_text(encoding="utf-8"))
    found = await page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    serious = [
        f"{one['id']}: {one['help']}: {node['html']}"
        for one in found["violations"]
        if one["impact"] in {"serious", "critical"}
        for node in one["nodes"]
    ]
    assert serious == []
    too_wide = await page.evaluate(
        "[...document.querySelectorAll('body, body *')]"
        ".filter((one) => document.documentElement.scrollWidth > innerWidth"
        " && one.getBoundingClientRect().right > innerWidth).map((one) => one.outerHTML.slice(0, 80))"
    )
    assert too_wide == []
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    if folder := os.environ.get("SCREENSHOTS"):
        name = page.url.partition("://")[2].partition("/")[2].replace("/", "-") or "chat"
        await page.screenshot(path=Path(folder) / f"{name}-{look}.png", full_page=True)
