"""`/sessions`, transcripts, their deletion, and `/`: what they show is what is stored, and never anything but text."""

import asyncio
import json
from datetime import timedelta
from uuid import UUID

import pytest
from redis.asyncio import Redis

from app.analytics.browse import browse_sessions, listing
from app.chat import utc_now
from app.redis_sessions.codec import FIELDS
from app.redis_sessions.keys import session_key
from app.store import Cursor
from app.web.pieces import CHARACTERS_SHOWN
from app.web.sessions import MESSAGES_OF_PAGE, SESSIONS_OF_PAGE
from tests.contract.suite import until
from tests.databases import migrate, new_database, taken_away
from tests.integration.api_client import UNKNOWN, assert_problem, empty_stores, for_mode, open_api
from tests.integration.test_pages import LOOKING, Html

pytestmark = pytest.mark.anyio

HOSTILE = '<script>alert("điều kiện")</script>\u202eevil\x1b[31m<img src=x onerror=alert(1)>'


@pytest.fixture(scope="module")
async def settings(servers, database_url):
    return await empty_stores(servers, database_url)


@pytest.fixture(scope="module")
async def api(settings):
    async with open_api(settings, redis_timeout_ms=10_000) as api:
        yield api


async def page(api, path, status=200):
    answer = await api.get(path, headers=LOOKING)
    assert answer.status_code == status, answer.text
    return answer.text, Html(answer.text)


def id_of(session):
    return session.rpartition("/")[2]


def links(html):
    return [one["href"] for one in html.of("a")]


# The list


async def test_sessions_of_everybody_are_listed_newest_first_in_pages(api, database_url):
    made = [id_of(await api.new_session(f"list{index % 3}")) for index in range(SESSIONS_OF_PAGE + 5)]
    listed, path = [], "/sessions?user_id="
    while path:
        _, html = await page(api, path)
        listed += [one.rpartition("/")[2] for one in links(html) if one.startswith("/sessions/")]
        path = next((one["href"] for one in html.of("a") if one.get("rel") == "next"), None)

    ours = [one for one in listed if one in set(made)]
    assert ours == made[::-1]
    assert len(listed) == len(set(listed))


async def test_a_list_is_read_back_page_by_page_to_the_newest_whatever_is_made_meanwhile(api):
    async def listed(path):
        _, html = await page(api, path)
        ids = [one.rpartition("/")[2] for one in links(html) if one.startswith("/sessions/")]
        return ids, {one["rel"]: one["href"] for one in html.of("a") if "rel" in one}

    made = [id_of(await api.new_session("back")) for _ in range(2 * SESSIONS_OF_PAGE + 1)][::-1]
    first, second, third = made[:SESSIONS_OF_PAGE], made[SESSIONS_OF_PAGE:-1], made[-1:]

    found, ways = await listed("/sessions?user_id=back")
    assert (found, set(ways)) == (first, {"next"})
    found, ways = await listed(ways["next"])
    assert (found, set(ways)) == (second, {"next", "prev"})
    found, ways = await listed(ways["next"])
    assert (found, set(ways)) == (third, {"prev"})

    found, ways = await listed(ways["prev"])
    assert (found, set(ways)) == (second, {"next", "prev"})
    back, forth = ways["prev"], ways["next"]
    assert (await listed(forth))[0] == third
    found, ways = await listed(back)
    assert (found, set(ways)) == (first, {"next"})
    # Three more: the page before the second is still the one next to it, and the first is a whole one.
    more = [id_of(await api.new_session("back")) for _ in range(3)][::-1]
    found, ways = await listed(back)
    assert (found, set(ways)) == (first, {"next", "prev"})
    found, ways = await listed(ways["prev"])
    assert (found, set(ways)) == ([*more, *first[:-3]], {"next"})


async def test_a_list_is_of_one_user_one_time_and_one_status(api):
    mine = id_of(await api.new_session("Hà Nội"))
    today = utc_now().date()

    for query in (
        "?user_id=H%C3%A0+N%E1%BB%99i",
        f"?user_id=H%C3%A0+N%E1%BB%99i&from={today - timedelta(days=1)}&to={today + timedelta(days=1)}&status=active",
    ):
        _, html = await page(api, f"/sessions{query}")
        assert [one for one in links(html) if one.startswith("/sessions/")] == [f"/sessions/{mine}"]
    for query in ("&status=archived", f"&to={today}", f"&from={today + timedelta(days=1)}"):
        _, html = await page(api, f"/sessions?user_id=H%C3%A0+N%E1%BB%99i{query}")
        assert "No session is like that" in html.text


async def test_a_session_of_the_list_goes_by_what_was_asked_first(api):
    session = await api.new_session("asker")
    await api.record(session, f"Học phí là bao nhiêu? {HOSTILE}", "Còn học bổng?")
    source, html = await page(api, "/sessions?user_id=asker")

    assert f"Học phí là bao nhiêu? {HOSTILE}"[:40] in html.text
    assert "học bổng" not in html.text
    assert "<script>alert" not in source


async def test_words_lead_to_the_message_that_says_them(api):
    session = await api.new_session("searcher")
    await api.record(session, "trước", "Điều kiện tham gia đấu thầu?", HOSTILE)
    source, html = await page(
        api, "/sessions?words=%22dieu+kien+tham%22&user_id=searcher&status=all&from=&to="
    )

    assert f"/sessions/{id_of(session)}?at=2#m-2" in links(html)
    assert "<mark>Điều kiện tham</mark>" in source
    _, html = await page(api, "/sessions?words=khongcogi&user_id=searcher")
    assert "No message says that" in html.text
    source, html = await page(api, "/sessions?words=evil&user_id=searcher")
    assert "<img" not in source
    assert "<script>alert" not in source
    assert "onerror=alert(1)" in html.text


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("?from=yesterday", "query.from"),
        ("?after=1.2.3", "query.after"),
        ("?before=1.2.3", "query.before"),
        (f"?after=1.{UUID(UNKNOWN).hex}&before=1.{UUID(UNKNOWN).hex}", "query.before"),
        ("?status=gone", "query.status"),
        ("?words=a", "query.q"),
        ("?words=ab&after=x", "query.after"),
        ("?words=ab&from=2020-01-01", "query.from"),
    ],
)
async def test_a_list_that_can_not_be_is_refused_by_name(api, query, named):
    _, html = await page(api, f"/sessions{query}", status=422)

    assert named in html.text


async def test_without_a_database_a_list_is_one_users(settings):
    async with open_api(for_mode(settings, "redis-only")) as api:
        _, html = await page(api, "/sessions")
        assert "Whose sessions?" in html.text
        session = await api.new_session("redis user")
        await api.record(session, "still here")
        _, html = await page(api, "/sessions?user_id=redis+user")
        assert f"/sessions/{id_of(session)}" in links(html)
        _, html = await page(api, f"/sessions/{id_of(session)}")
        assert "PostgreSQL Not used Redis Owned by Redis" in html.text
        assert "still here" in html.text


@pytest.mark.parametrize(
    ("asked", "index"),
    [
        ({}, "chat_sessions_created_at_idx"),
        ({"since": utc_now() - timedelta(days=1), "until": utc_now()}, "chat_sessions_created_at_idx"),
        ({"user_id": "An"}, "chat_sessions_user_idx"),
    ],
    ids=["everybody", "a time", "one user"],
)
@pytest.mark.parametrize("way", ["after", "before"])
async def test_a_page_of_the_list_is_one_look_at_an_index(api, asked, index, way):
    place = Cursor(created_at=utc_now() - timedelta(minutes=1000), session_id=UUID(UNKNOWN))
    statement, values = listing(**asked, ttl_seconds=3600, limit=51, **{way: place})
    async with api.runtime.database.transaction() as conn:
        # Enough of them for an index to matter, whatever the tests before have left; they are not committed.
        await conn.execute(
            "INSERT INTO chat.chat_sessions (session_id, user_id, created_at, last_activity) "
            "SELECT gen_random_uuid(), 'user ' || n, now() - n * interval '1 minute', now() FROM generate_series(1, 2000) n"
        )
        await conn.execute("ANALYZE chat.chat_sessions")
        # A few rows are read, and sorted, faster than by their index. What has to be sorted is so all the same.
        for slow in ("seqscan", "bitmapscan", "sort"):
            await conn.execute(f"SET LOCAL enable_{slow} = off")
        plan = await conn.fetch(f"EXPLAIN {statement}", *values)
        lines = "\n".join(row[0] for row in plan)

    assert index in lines
    assert "Sort" not in lines


async def test_a_place_in_the_list_gives_nothing_twice_when_sessions_are_made_meanwhile(api):
    async def browse(after=None):
        return await browse_sessions(
            api.runtime.database, user_id="keyset", ttl_seconds=3600, limit=2, after=after
        )

    made = [id_of(await api.new_session("keyset")) for _ in range(3)]
    first = await browse()
    await api.new_session("keyset")
    second = await browse(first.older)

    assert [str(one.session_id) for one in (*first.sessions, *second.sessions)] == made[::-1]
    assert second.older is None


# A transcript


async def trusted(api, session):
    """The page of a session, once its copy is trusted: a machine that is busy with other things may end the service's
    lease for a moment.
    """

    async def is_trusted():
        nonlocal html
        await api.get(f"{session}/history")
        _, html = await page(api, f"/sessions/{id_of(session)}")
        return "Redis Trusted copy" in html.text

    html = None
    await until(is_trusted)
    return html


async def test_a_transcript_says_who_said_what_and_where_it_lives(api):
    session = await api.new_session("An")
    answer = {
        "role": "assistant",
        "content": "Có ba.",
        "metadata": {"processing_time_ms": 1250, "sources": ["Điều 5", {"a": 1}]},
    }
    body = {"messages": [{"role": "user", "content": "Điều kiện?"}, answer]}
    await api.post(f"{session}/history", json=body)
    html = await trusted(api, session)

    assert "User" in html.text
    assert "took 1.2 s" in html.text or "took 1.3 s" in html.text
    assert 'Sources: 2 Điều 5 {"a": 1}' in html.text
    assert "PostgreSQL All of it Redis Trusted copy Held there the newest 2 of 2" in html.text
    assert [one for one in html.elements if "data-countdown" in one[1]]
    assert {"m-1", "m-2"} <= {one.get("id") for one in html.of("article")}


async def test_a_look_at_redis_tells_how_long_it_lives_before_it_is_read(api, redis_of):
    session = await api.new_session("An")
    await api.record(session, "a")
    key = session_key(id_of(session))
    await redis_of.pexpire(key, 100_000)
    _, html = await page(api, f"/sessions/{id_of(session)}")
    shown = next(
        attributes["data-countdown"] for _, attributes in html.elements if "data-countdown" in attributes
    )
    assert 90 < int(shown) <= 100

    await redis_of.delete(key)
    _, html = await page(api, f"/sessions/{id_of(session)}")
    assert "Redis Not now" in html.text
    # That look has filled it.
    await redis_of.delete(key)
    await redis_of.lpush(key, "a")
    _, html = await page(api, f"/sessions/{id_of(session)}")
    assert "Redis Something else" in html.text
    await redis_of.delete(key)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("pending", "0000000009", "Dirty copy"), ("epoch", "f" * 16, "Copy of another epoch")],
)
async def test_a_copy_that_is_not_to_be_believed_is_told_from_a_trusted_one(
    api, redis_of, field, value, said
):
    session = await api.new_session("An")
    await api.record(session, "a")
    await trusted(api, session)

    await redis_of.setrange(session_key(id_of(session)), FIELDS[field][0], value)
    _, html = await page(api, f"/sessions/{id_of(session)}")
    assert f"Redis {said}, compared at the next read" in html.text
    # It was compared, and is believed again.
    await trusted(api, session)


async def test_where_every_read_is_compared_no_copy_is_called_trusted(settings):
    async with open_api(settings, cache_verify="always") as api:
        session = await api.new_session("An")
        await api.record(session, "a")
        _, html = await page(api, f"/sessions/{id_of(session)}")

    assert "Redis Copy, compared at every read" in html.text


@pytest.fixture
async def redis_of(servers, anyio_backend):
    async with Redis.from_url(servers.redis_url, db=1) as redis:
        yield redis


async def test_a_long_transcript_is_read_page_by_page_and_around_a_message(api):
    session = await api.new_session("long")
    for first in range(0, 300, 100):
        await api.record(session, *(f"message {first + index + 1}." for index in range(100)))
    path = f"/sessions/{id_of(session)}"

    def seqs(html):
        return [int(one["id"].removeprefix("m-")) for one in html.of("article")]

    _, html = await page(api, path)
    assert seqs(html) == list(range(251, 301))
    read = seqs(html)
    while older := next((one["href"] for one in html.of("a") if one.get("rel") == "prev"), None):
        _, html = await page(api, older)
        read = seqs(html) + read
    assert read == list(range(1, 301))
    newer = next(one["href"] for one in html.of("a") if one.get("rel") == "next")
    _, html = await page(api, newer)
    assert seqs(html) == list(range(51, 101))

    source, html = await page(api, f"{path}?at=120")
    assert len(seqs(html)) == MESSAGES_OF_PAGE
    assert 120 in seqs(html)
    assert source.count("message-marked") == 1
    assert "message 120." in html.text
    _, html = await page(api, f"{path}?at=301")
    assert "There is no message #301." in html.text
    _, html = await page(api, f"{path}?before=1")
    assert f"{path}#said" in links(html)


async def test_older_messages_are_to_be_had_as_a_part_of_a_page_down_to_the_first_one(api):
    session = await api.new_session("parts")
    await api.record(session, *(f"message {seq}." for seq in range(1, 91)))
    _, html = await page(api, f"/sessions/{id_of(session)}")
    [link] = [one for one in html.of("a") if "hx-get" in one]
    part = await api.get(link["hx-get"])
    assert part.status_code == 200
    found = Html(part.text)

    assert not found.of("html")
    assert [one["id"] for one in found.of("article")] == [f"m-{seq}" for seq in range(1, 41)]
    assert f"/sessions/{id_of(session)}?at=7#m-7" in links(found)
    assert not [one for one in found.of("a") if "hx-get" in one]
    # The same page, for who has no script.
    _, html = await page(api, link["href"])
    assert html.of("article") == found.of("article")
    for path in (f"/sessions/{id_of(session)}/messages", f"/sessions/{id_of(session)}/messages?before=0"):
        await page(api, path, status=422)
    await page(api, f"/sessions/{UNKNOWN}/messages?before=9", status=404)


async def test_a_transcript_of_100_000_messages_is_50_at_a_time_wherever_one_looks(settings):
    async with open_api(
        settings, append_messages_max=10_000, request_body_bytes_max=8 * 2**20, redis_timeout_ms=10_000
    ) as api:
        session = await api.new_session("endless")
        for first in range(0, 100_000, 10_000):
            await api.record(session, *(f"{first + index + 1}." for index in range(10_000)))
        for query, seqs in (
            ("", range(99_951, 100_001)),
            ("?before=51", range(1, 51)),
            ("?at=60000", range(59_975, 60_025)),
        ):
            _, html = await page(api, f"/sessions/{id_of(session)}{query}")
            assert [one["id"] for one in html.of("article")] == [f"m-{seq}" for seq in seqs]
        assert "60000." in html.text
        await api.delete(session)


async def test_a_huge_message_is_cut_and_can_be_had_whole(api):
    session = await api.new_session("huge")
    await api.record(session, "x" * CHARACTERS_SHOWN, "y" * (CHARACTERS_SHOWN + 1))
    source, html = await page(api, f"/sessions/{id_of(session)}")
    assert "x" * CHARACTERS_SHOWN in source
    assert "y" * (CHARACTERS_SHOWN + 1) not in source
    [whole] = [one["href"] for one in html.of("a") if "whole=2" in one["href"]]
    source, _ = await page(api, whole)
    assert "y" * (CHARACTERS_SHOWN + 1) in source


@pytest.mark.parametrize("path", ["/sessions/{id}", "/?user_id={user}&session={id}"])
async def test_hostile_words_are_only_ever_text(api, path):
    session = await api.new_session("<b>bold</b>")
    body = {"messages": [{"role": "assistant", "content": HOSTILE, "metadata": {"sources": [HOSTILE]}}]}
    await api.post(f"{session}/history", json=body)
    source, html = await page(api, path.format(id=id_of(session), user="%3Cb%3Ebold%3C/b%3E"))

    assert "<img" not in source
    assert "<b>" not in source
    assert all("src" in one or one["type"] == "application/json" for one in html.of("script"))
    assert html.text.count("onerror=alert(1)") == 2
    assert any(one.get("dir") == "auto" for one in html.of("div"))


async def test_a_session_that_there_is_not_is_a_page_that_says_so(api):
    for path in (f"/sessions/{UNKNOWN}", f"/sessions/{UNKNOWN}/delete", f"/?session={UNKNOWN}"):
        _, html = await page(api, path, status=404)
        assert "There is nothing here" in html.text
    assert_problem(await api.get(f"/sessions/{UNKNOWN}"), 404, "session_not_found")


async def test_while_postgresql_is_out_a_cached_transcript_is_shown_and_labelled(settings, servers):
    async with new_database(servers, "chat_pages_outage") as url:
        await migrate(url)
        async with open_api(settings, database_url=url) as api:
            session = await api.new_session("outage")
            await api.record(session, "cached words")
            async with taken_away(servers, "chat_pages_outage"):
                while api.runtime.stores.lease.current() is not None:  # noqa: ASYNC110 - time has no event of ours
                    await asyncio.sleep(0.01)
                _, html = await page(api, f"/sessions/{id_of(session)}")
                assert "PostgreSQL does not answer. This is what Redis holds" in html.text
                assert "PostgreSQL No answer Redis" in html.text
                assert "cached words" in html.text
                _, html = await page(api, f"/?user_id=outage&session={id_of(session)}")
                assert "cached words" in html.text
                assert "They can't be listed now" in html.text
                for path in ("/sessions", "/sessions?words=cached", "/analytics", f"/sessions/{UNKNOWN}"):
                    _, html = await page(api, path, status=503)
                    assert "A store can't be reached" in html.text
            _, html = await page(api, "/sessions")
            assert f"/sessions/{id_of(session)}" in links(html)


# Deletion


async def test_a_session_is_deleted_after_a_question_and_from_a_page_of_ours_only(api):
    session = await api.new_session("delete me")
    await api.record(session, "a", "b")
    path = f"/sessions/{id_of(session)}/delete"
    _, html = await page(api, path)
    assert "Delete this session?" in html.text
    assert "Messages 2" in html.text

    for headers in (
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://evil.test"},
    ):
        refused = await api.post(path, headers=LOOKING | headers)
        assert refused.status_code == 403
    assert await api.message_count(session) == 2

    done = await api.post(
        path, headers=LOOKING | {"Sec-Fetch-Site": "same-origin", "Origin": "http://chat.test"}
    )
    assert done.status_code == 303
    _, html = await page(api, done.headers["location"])
    assert f"Deleted for good: {id_of(session)}" in html.text
    assert (await api.get(session)).status_code == 404


# The chat


async def test_the_chat_shows_what_was_said_and_past_sessions_of_the_user(api):
    session = await api.new_session("chatter")
    await api.post(f"{session}/messages", json={"message": "Xin chào"})
    other = await api.new_session("chatter")
    _, html = await page(api, f"/?user_id=chatter&session={id_of(session)}")

    assert "Xin chào" in html.text
    assert "heard: Xin chào" in html.text
    past = [one for one in links(html) if one.startswith("/?user_id=chatter&session=") and "lang=" not in one]
    assert past == [
        f"/?user_id=chatter&session={id_of(other)}",
        f"/?user_id=chatter&session={id_of(session)}",
    ]
    chat = next(attributes for _, attributes in html.elements if "data-chat" in attributes)
    assert (chat["data-user"], chat["data-session"]) == ("chatter", id_of(session))
    fragment = await api.get(f"/chat/past?user_id=chatter&session={id_of(other)}")
    assert "<html" not in fragment.text
    assert id_of(other) in fragment.text


async def test_past_sessions_are_named_by_what_was_asked_first(api):
    hostile = "<b>Điều kiện</b>\nnào? " + "x" * 100
    asked, greeted, silent, _empty = [await api.new_session("namer") for _ in range(4)]
    await api.post(f"{asked}/messages", json={"message": hostile})
    await api.post(f"{asked}/messages", json={"message": "And then?"})
    await api.post(
        f"{greeted}/history",
        json={
            "messages": [{"role": "assistant", "content": "Welcome"}, {"role": "user", "content": "Học phí?"}]
        },
    )
    await api.post(f"{silent}/history", json={"messages": [{"role": "user", "content": " \n"}]})

    _, html = await page(api, "/?user_id=namer")

    named = [attributes.get("class") for tag, attributes in html.elements if tag == "bdi"]
    assert named == ["clip", "clip"]
    assert hostile[:80] in html.words
    assert "Học phí?" in html.words
    assert "Welcome" not in html.text
    assert "And then?" not in html.text
    _, all_empty = await page(api, "/?user_id=nobody")
    assert "None yet." in all_empty.text


async def test_a_session_of_somebody_else_is_none(api):
    session = await api.new_session("owner")

    await page(api, f"/?user_id=thief&session={id_of(session)}", status=404)


async def test_who_begins_is_shown_what_he_can_ask_about(settings, api):
    def offered(html):
        return [words for words in html.words if words.startswith("What is there about")]

    async with open_api(settings, assistant="suggests") as suggesting:
        _, html = await page(suggesting, "/?lang=en")
        session = await suggesting.new_session("asks")
        await suggesting.record(session, "a")
        _, begun = await page(suggesting, f"/?user_id=asks&session={id_of(session)}")
    _, none = await page(api, "/")

    topics = ("one", "<b>two</b>", "three" * 15)
    assert offered(html) == [f"What is there about “{topic}”?" for topic in topics]
    assert offered(begun) == offered(none) == []


async def test_who_says_nothing_is_a_guest_and_begins_anew(api):
    _, html = await page(api, "/")

    assert (
        next(attributes for _, attributes in html.elements if "data-chat" in attributes)["data-user"]
        == "guest"
    )
    assert "Ask something" in html.text
    words = next(one for one in html.words if one.strip().startswith('{"'))
    assert json.loads(words)["resend"] == "Send again"
