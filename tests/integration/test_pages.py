"""What all pages have in common, over HTTP: the frame, its languages, its files, and its errors."""

import gzip
import importlib.util
import json
import re
import string
from html.parser import HTMLParser
from pathlib import Path

import pytest

from app.errors import DurableStoreUnavailable
from app.web.assets import address, assets
from app.web.frame import PLACES
from app.web.texts import TEXTS
from tests.integration.api_client import assert_problem, open_api

PROJECT = Path(__file__).parents[2]

pytestmark = pytest.mark.anyio

LOOKING = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}

#: All that a first visit of a page loads, packed.
FIRST_PAINT_BYTES_MAX = 60_000


class Html(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.words = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
async def api(settings):
    async with open_api(settings) as api:
        yield api


async def looked_at(api, path, **headers):
    """A page as a browser gets it."""
    answer = await api.get(path, headers=LOOKING | headers)
    assert answer.headers["content-type"] == "text/html; charset=utf-8", answer.text
    return answer, Html(answer.text)


# The frame


@pytest.mark.parametrize("path", [*PLACES.values(), "/nothing"])
async def test_a_page_runs_only_scripts_that_are_files_of_this_service(api, path):
    answer, html = await looked_at(api, path)

    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    for script in html.of("script"):
        # JSON is data: nothing runs it.
        assert script.get("src", "").startswith("/assets/") or script.get("type") == "application/json"
    for _, attributes in html.elements:
        assert not {name for name in attributes if name == "style" or name.startswith("on")}
        for name in {"src", "href", "action", "hx-get"} & set(attributes):
            assert attributes[name] == "" or re.match(r"[/?#][^/]|/$", attributes[name]), attributes


@pytest.mark.parametrize("path", PLACES.values())
async def test_a_first_visit_loads_less_than_60_kb(api, path):
    page, html = await looked_at(api, path)
    files = [one["src"] for one in html.of("script") if "src" in one] + [
        one["href"] for one in html.of("link")
    ]
    loaded = [await api.get(file) for file in files]

    assert all(one.status_code == 200 for one in loaded)
    assert page.headers["content-encoding"] == "gzip"
    sent = sum(int(one.headers["content-length"]) for one in (page, *loaded))
    assert sent < FIRST_PAINT_BYTES_MAX


@pytest.mark.parametrize("path", PLACES.values())
async def test_the_header_says_where_one_is_and_leads_to_the_same_page_in_the_other_language(api, path):
    _, html = await looked_at(api, f"{path}?lang=en")
    links = html.of("a")

    assert [one["href"] for one in links if one.get("aria-current") == "page"] == [path]
    assert {"lang": "vi", "href": f"{path}?lang=vi"}.items() <= next(
        one for one in links if one.get("lang") == "vi"
    ).items()


async def test_a_text_is_never_markup(api):
    answer, html = await looked_at(api, "/stores?<script>alert(1)</script>=1&<script>alert(1)</script>=2")

    assert answer.status_code == 422
    assert "<script>alert" not in answer.text
    assert "query.<script>alert(1)</script>: is given twice" in html.text


async def test_without_pages_the_api_is_all_there_is(settings):
    async with open_api(settings, enable_pages=False) as api:
        for path in (*PLACES.values(), address("style.css")):
            assert_problem(await api.get(path, headers=LOOKING), 404, "not_found")


# Languages


def test_both_languages_have_every_text_with_the_same_values_in_it():
    def values(text):
        return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name)

    for key, (english, vietnamese) in TEXTS.items():
        assert english, key
        assert vietnamese, key
        assert values(english) == values(vietnamese), key


def test_every_text_is_on_some_page_and_every_page_finds_its_texts():
    """As far as keys stand in full: those that are put together begin with one that does."""
    sources = [
        path.read_text(encoding="utf-8")
        for path in (PROJECT / "app/web").rglob("*")
        if path.suffix in {".html", ".py"} and path.name != "texts.py"
    ]
    asked = {
        key
        for source in sources
        for key in re.findall(r'\.text\(f?"([a-z_.-]+)|"([a-z_][a-z_.-]+)"[^"{}|]*\| t\b', source)
        for key in filter(None, key)
    }
    stems = tuple(key for key in asked if key.endswith("."))

    assert {key for key in asked if not key.endswith(".")} <= set(TEXTS)
    assert {key for key in TEXTS if key not in asked and not key.startswith(stems)} == set()


@pytest.mark.parametrize(
    ("accepted", "language"),
    [
        ("", "en"),
        ("vi", "vi"),
        ("vi-VN,vi;q=0.9,en;q=0.8", "vi"),
        ("en-GB,en;q=0.9,vi;q=0.5", "en"),
        ("fr, vi;q=0.1", "vi"),
        ("fr", "en"),
        (";;q=,,", "en"),
        ("vi;q=0", "en"),
    ],
)
async def test_a_page_is_in_the_language_that_the_browser_prefers(api, accepted, language):
    _, html = await looked_at(api, "/stores", **{"Accept-Language": accepted})

    assert html.of("html") == [{"lang": language}]


async def test_the_language_of_an_address_is_kept_and_goes_before_the_browsers(api):
    answer, html = await looked_at(api, "/stores?lang=vi", **{"Accept-Language": "en"})
    assert html.of("html") == [{"lang": "vi"}]
    assert "HttpOnly" in answer.headers["set-cookie"]

    _, html = await looked_at(api, "/stores", **{"Accept-Language": "en"})
    assert html.of("html") == [{"lang": "vi"}]


async def test_a_language_that_there_is_not_is_refused_by_name(api):
    answer, html = await looked_at(api, "/stores?lang=fr")

    assert answer.status_code == 422
    assert "query.lang: should be one of en, vi" in html.text


# Files


async def test_a_file_may_be_kept_for_ever_and_is_the_same_packed_and_plain(api):
    for name, asset in assets().items():
        packed = await api.get(asset.address, headers={"Accept-Encoding": "gzip"})
        plain = await api.get(asset.address, headers={"Accept-Encoding": "identity"})

        assert "immutable" in packed.headers["cache-control"]
        assert (packed.headers["content-encoding"], "content-encoding" in plain.headers) == ("gzip", False)
        assert packed.content == plain.content == (PROJECT / "app/web/static" / name).read_bytes()
        assert gzip.decompress(asset.packed) == plain.content


async def test_a_file_of_another_version_is_not_this_one(api):
    name = address("style.css").rpartition("/")[2]

    assert_problem(await api.get(f"/assets/000000000000/{name}"), 404, "not_found")
    assert_problem(await api.get("/assets/000000000000/vendor/vendor.lock"), 404, "not_found")


def vendoring():
    spec = importlib.util.spec_from_file_location("vendor", PROJECT / "tools/vendor.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_others_made_is_as_the_locks_pin_it():
    tool = vendoring()

    assert [flaw for lock in tool.LOCKS for flaw in tool.flaws(lock)] == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "a.js").write_text("else"), "is not what"),
        (lambda folder: (folder / "a.js").unlink(), "is missing"),
        (lambda folder: (folder / "b.js").write_text("b"), "is not named"),
    ],
)
def test_a_file_that_is_not_as_pinned_is_found(tmp_path, change, said):
    tool = vendoring()
    folder = tmp_path / "a-1.0"
    folder.mkdir()
    (folder / "a.js").write_text("a")
    digest = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    lock = tmp_path / "vendor.lock"
    lock.write_text(json.dumps([{"name": "a", "version": "1.0", "files": {"dist/a.js": digest}}]))
    assert list(tool.flaws(lock)) == []

    change(folder)

    [flaw] = tool.flaws(lock)
    assert said in flaw


# Errors


async def test_who_looks_sees_an_error_in_the_frame_and_who_calls_gets_its_problem(api):
    answer, html = await looked_at(api, "/nothing")

    assert answer.status_code == 404
    assert "There is nothing here" in html.text
    assert html.of("nav")
    assert_problem(await api.get("/nothing"), 404, "not_found")
    assert_problem(await api.get("/nothing", headers={"Accept": "application/json"}), 404, "not_found")


@pytest.mark.parametrize("path", ["/api/nothing", "/api/analytics/nothing", "/health/nothing"])
async def test_a_call_of_the_api_is_answered_with_a_problem_whoever_makes_it(api, path):
    answer = await api.get(path, headers=LOOKING)

    assert answer.headers["content-type"] == "application/problem+json"


async def test_a_store_that_is_out_is_said_in_the_frame_with_what_to_do(api):
    async def fails():
        raise DurableStoreUnavailable("nobody listens", hint="start PostgreSQL", retry_after_seconds=3)

    api.app.add_api_route("/fails", fails)
    answer, html = await looked_at(api, "/fails", **{"Accept-Language": "vi"})

    assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")
    assert "Không kết nối được kho dữ liệu" in html.text
    assert "nobody listens" in html.text
    assert "start PostgreSQL" in html.text


async def test_a_fault_of_ours_shows_nothing_of_it(api):
    async def fails():
        raise ZeroDivisionError("a secret")

    api.app.add_api_route("/fails", fails)
    answer, html = await looked_at(api, "/fails")

    assert answer.status_code == 500
    assert "Something failed inside the service" in html.text
    assert "secret" not in answer.text
