"""Search in transcripts, on a real PostgreSQL: what is found, in which order, on which page."""

import unicodedata
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from app.analytics import search as searching
from app.analytics.search import RANGE_DAYS_MAX, Place, parse_query, search
from app.chat import utc_now
from app.errors import DurableStoreUnavailable, QueryRefused, RangeRefused, StartRefused
from app.postgres import search_index
from app.postgres.engine import Database, create_engine
from app.postgres.partitions import make_partitions, partition_name
from app.postgres.search_index import build_indexes, drop_indexes, months_for, partition_states
from app.postgres.store import PostgresChatSessionStore
from app.store import Append
from tests.factories import new_message

pytestmark = pytest.mark.anyio

NOON = datetime(2026, 3, 10, 12, tzinfo=UTC)
SINCE, UNTIL = datetime(2026, 3, 9, tzinfo=UTC), datetime(2026, 3, 16, tzinfo=UTC)
MOMENT = timedelta(milliseconds=1)


@pytest.fixture
def store(database):
    return PostgresChatSessionStore(database, ttl_seconds=3600)


async def record(store, *contents, user_id="an", at=NOON, role="user"):
    """A session with these messages, all of one moment."""
    session = (await store.create_session(user_id)).session
    messages = tuple(new_message(content, created_at=at, role=role) for content in contents)
    await store.append(Append(session_id=session.session_id, messages=messages))
    return session.session_id


async def page(database, words, *, match="words", since=SINCE, before=None, **options):
    query = parse_query(words, match)
    return await search(database, query, since=since, before=before or Place(UNTIL), **options)


async def found(database, words, **options):
    """The hits as they are marked in their snippets, newest first."""
    return [
        tuple(hit.snippet[begin:end] for begin, end in hit.marks)
        for hit in (await page(database, words, **options)).hits
    ]


def nfd(text):
    return unicodedata.normalize("NFD", text)


HOC_BONG = ["Học bổng", nfd("Học bổng"), "HỌC BỔNG", nfd("HỌC BỔNG"), "hoc bong", "hóc bông"]


@pytest.mark.parametrize("match", ["words", "substring"])
@pytest.mark.parametrize("typed", ["học bổng", nfd("học bổng"), "hoc bong", "HOC BONG", "HỌC BỔNG"])
async def test_vietnamese_is_found_with_and_without_accents_in_any_form(database, store, typed, match):
    await record(store, *HOC_BONG)

    hits = (await page(database, typed, match=match)).hits

    assert [hit.snippet for hit in hits] == HOC_BONG[::-1]
    assert {hit.snippet[hit.marks[0][0] : hit.marks[-1][1]] for hit in hits} == set(HOC_BONG)


async def test_a_stroke_is_an_accent(database, store):
    await record(store, "Đà Nẵng", "đa nang", "Da Nang")

    assert len(await found(database, "đà nẵng")) == len(await found(database, "DA NANG")) == 3


@pytest.mark.parametrize(
    ("words", "contents"),
    [
        ("thầu đấu", ["đấu thầu", "đấu giá, rồi thầu"]),
        ("thau", ["đấu thầu", "đấu giá, rồi thầu"]),
        ('"đấu thầu"', ["đấu thầu"]),
        ("dau/thau", ["đấu thầu"]),
        ("tha", []),
        ("a_b", ["a_b"]),
        ("24/2024", ["Nghị định 24/2024/NĐ-CP", "24: 2024"]),
        ("日本", ["日本 x"]),
    ],
)
async def test_words_are_whole_and_all_of_them_and_quoted_ones_follow_each_other(
    database, store, words, contents
):
    await record(
        store,
        *(
            "đấu thầu",
            "đấu giá, rồi thầu",
            "a_b",
            "a b",
            "axb",
            "Nghị định 24/2024/NĐ-CP",
            "24: 2024",
            "124/2024",
        ),
        *("日本 x", "日本語"),
    )

    assert sorted(hit.snippet for hit in (await page(database, words)).hits) == sorted(contents)


@pytest.mark.parametrize(
    "text",
    [
        "50%",
        "a_b",
        r"c:\d",
        ".*",
        "(x",
        "[a-",
        "a|b",
        "***=x",
        "(?i)",
        "x{2}",
        "$1",
        "''; --",
        "\t\n xy",
        "😀😀",
    ],
)
async def test_every_character_of_a_substring_is_only_itself(database, store, text):
    await record(store, f"vor{text}nach", "50 aXb c:7d xx (i) a 1 x")

    assert await found(database, text, match="substring") == [(text,)]


async def test_a_word_beside_an_accented_letter_or_a_mark_is_no_word(database, store):
    await record(store, "hocé", "éhoc", nfd("hocé"), nfd("éhoc"), "hocж", "жhoc", "hoc\u0323", "-hoc-")

    assert await found(database, "hoc") == [("hoc",), ("hoc\u0323",)]


async def test_a_hit_behind_many_that_only_look_like_one_is_found(database, store):
    await record(store, "hoc", at=NOON)
    await record(store, *["hocж"] * 100, at=NOON + MOMENT)

    assert await found(database, "hoc") == [("hoc",)]


async def test_snippets_are_cut_around_the_first_hit_between_letters(database, store):
    content = nfd("ộ") * 100 + " đây " + "x" * 300 + " đây"
    await record(store, content)

    [hit] = (await page(database, "day")).hits

    assert unicodedata.combining(hit.snippet[0]) == 0
    assert content[hit.snippet_start :].startswith(hit.snippet)
    assert [hit.snippet[begin:end] for begin, end in hit.marks] == ["đây"]
    assert len(hit.snippet) == 240
    assert hit.content_characters == len(content)


async def test_the_range_begins_with_its_first_moment_and_ends_before_its_last(database, store):
    for at in (SINCE - MOMENT, SINCE, UNTIL - MOMENT, UNTIL):
        await record(store, f"day {at:%d}", at=at)

    assert [hit.place.created_at for hit in (await page(database, "day")).hits] == [UNTIL - MOMENT, SINCE]


async def test_only_a_user_and_only_a_role(database, store):
    await record(store, "một", user_id="an")
    await record(store, "một hai", user_id="binh")
    await record(store, "một ba", user_id="binh", role="assistant")

    assert {hit.user_id for hit in (await page(database, "mot", user_id="binh")).hits} == {"binh"}
    [hit] = (await page(database, "mot", user_id="binh", role="assistant")).hits
    assert (hit.snippet, hit.role) == ("một ba", "assistant")
    assert await found(database, "mot", user_id="chi") == []


async def test_a_deleted_session_is_not_found(database, store):
    session_id = await record(store, "bí mật")
    await store.delete_session(session_id)

    assert await found(database, "bi mat") == []


async def test_pages_have_every_hit_once_while_messages_come_and_go(database, store):
    """Many of one moment, so that the session and the seq decide; and over hours, so that windows do."""
    old = [
        (await record(store, "câu một", "câu hai", "khác", at=NOON + timedelta(hours=hours)))
        for hours in (0, 0, 0, 1, 5, 50)
    ]
    seen, place = [], Place(UNTIL)
    while place is not None:
        one = await page(database, "cau", before=place, limit=2)
        seen += [(hit.place.session_id, hit.place.seq) for hit in one.hits]
        place = one.next
        await record(store, "câu mới", at=UNTIL - MOMENT)
        await store.delete_session(await record(store, "câu mất", at=NOON))

    assert sorted(seen) == sorted((session_id, seq) for session_id in old for seq in (1, 2))
    assert len(seen) == len(set(seen))


async def test_messages_of_the_first_moment_are_on_pages_of_their_own(database, store):
    session_id = await record(store, "câu một", "câu hai", "câu ba", at=SINCE)
    seen, place = [], Place(UNTIL)
    while place is not None:
        one = await page(database, "cau", before=place, limit=1)
        seen += [hit.place for hit in one.hits]
        place = one.next

    assert seen == [Place(SINCE, session_id, seq) for seq in (3, 2, 1)]


async def test_a_search_that_takes_long_gives_what_it_found_and_goes_on(database, store, monkeypatch):
    monkeypatch.setattr(searching, "ENOUGH_SECONDS", 0.0)
    await record(store, "mới", at=UNTIL - timedelta(minutes=5))
    await record(store, "mới", at=SINCE)

    first = await page(database, "moi")
    hits, place, pages = list(first.hits), first.next, 1
    while place is not None:
        one = await page(database, "moi", before=place)
        hits, place, pages = hits + list(one.hits), one.next, pages + 1

    assert (first.partial, len(first.hits), len(hits)) == (True, 1, 2)
    assert pages > 2


async def test_a_window_that_is_not_read_in_time_is_read_in_smaller_ones(database, store, monkeypatch):
    await record(store, "một", at=UNTIL - timedelta(minutes=50))
    candidates, widths = searching._candidates, []

    async def slow_if_wide(database, query, months, since, before, *rest):
        widths.append(before.created_at - since)
        slow = widths[-1] > timedelta(minutes=10)
        monkeypatch.setattr(searching, "_NEWEST", SLOW if slow else QUICK)
        return await candidates(database, query, months, since, before, *rest)

    monkeypatch.setattr(searching, "_candidates", slow_if_wide)
    monkeypatch.setattr(searching, "_BOUNDS", searching.text("SET LOCAL statement_timeout = 50"))

    assert await found(database, "mot", since=UNTIL - timedelta(hours=1)) == [("một",)]
    assert widths[0] == timedelta(hours=1)
    assert widths[1] == timedelta(hours=1) / 16


QUICK = searching._NEWEST
SLOW = QUICK.replace("({}) m", "({}) m WHERE pg_sleep(1) IS NOT NULL")


async def test_a_word_that_is_longer_than_an_index_takes_is_found_by_one(database, store, monkeypatch):
    word = "a1" * 90
    await record(store, word * 50, word, f"{word[:-1]}2")
    monkeypatch.setattr(search_index, "_WORTH_SHARE", 1e9)
    await build_indexes(database, before=date.max)
    try:
        assert await found(database, word) == [(word,)]
    finally:
        await drop_indexes(database)


async def test_only_months_that_have_ended_get_an_index_and_it_is_made_once(database):
    this_month = utc_now().date().replace(day=1)
    await make_partitions(database, [date(2024, 2, 1)])
    try:
        assert "chat_messages_2024_02" in await build_indexes(database, before=this_month)
        assert await build_indexes(database, before=this_month) == []
        indexed = {state.name for state in await partition_states(database) if state.indexed}
        assert partition_name(this_month) not in indexed
    finally:
        assert "chat_messages_2024_02" in await drop_indexes(database)
    assert not any(state.begun for state in await partition_states(database))


async def test_an_index_that_a_frequent_word_gains_nothing_from_is_not_asked(database, store):
    await record(store, *["und so weiter"] * 2990, *[f"selten{number}" for number in range(10)])
    await build_indexes(database, before=date.max)
    try:
        assert (await months_for(database, ["und"])).indexed == ()
        assert (await months_for(database, ["selten1"])).indexed != ()
        assert (await months_for(database, [])).indexed == ()
    finally:
        await drop_indexes(database)


async def test_what_a_broken_build_left_is_not_asked_and_made_anew(database):
    await build_indexes(database, before=date.max)
    try:
        async with database.connection() as conn:
            await conn.execute(
                "UPDATE pg_index SET indisvalid = false "
                "WHERE indexrelid = 'chat.chat_messages_legacy_search_words_idx'::regclass"
            )
        assert date(1, 1, 1) in (await months_for(database, ["a"])).others
        assert await build_indexes(database, before=date.max) == ["chat_messages_legacy"]
        assert all(state.indexed for state in await partition_states(database))
    finally:
        await drop_indexes(database)


async def test_two_do_not_build_at_once(database):
    async with database.connection() as conn:
        await conn.fetchval("SELECT pg_advisory_lock($1)", search_index._LOCK)
        with pytest.raises(StartRefused, match="by somebody else"):
            await build_indexes(database, before=date.max)
        await conn.fetchval("SELECT pg_advisory_unlock($1)", search_index._LOCK)


async def test_an_outage_is_no_slow_window():
    nowhere = Database(create_engine("postgresql://chat@127.0.0.1:1/chat", application_name="tests"))

    with pytest.raises(DurableStoreUnavailable):
        await page(nowhere, "mot")


@pytest.mark.parametrize(
    ("words", "match", "said"),
    [
        ("", "words", "has 0 characters"),
        ("   ", "substring", "has 0 characters"),
        ("\u0301\u0301\u0301", "words", "has 0 characters"),
        ("a", "words", "has 1 characters"),
        ("a" * 201, "substring", "at most 200"),
        ("%% ??", "words", "no letter or digit"),
        ('"" ""', "words", "no letter or digit"),
        (" ".join(f"a{index}" for index in range(11)), "words", "at most 10"),
    ],
)
def test_what_is_too_short_or_too_long_is_refused(words, match, said):
    with pytest.raises(QueryRefused, match=said):
        parse_query(words, match)


@pytest.mark.parametrize(
    ("since", "until"),
    [(NOON, NOON), (UNTIL, SINCE), (UNTIL - timedelta(days=RANGE_DAYS_MAX) - MOMENT, UNTIL)],
)
async def test_a_range_that_is_wrong_or_too_wide_is_refused(database, since, until):
    with pytest.raises(RangeRefused):
        await page(database, "mot", since=since, before=Place(until))


# Few letters, so that what is searched for is there: of all forms, with marks alone, beside what is no letter.
LETTERS = 'aAăằÂdDđĐoơỢnNzZ_1éßжЖ日😀 ,.-"%\\\n\u0301\u0323\u212a\u2002ſ'
texts = st.text(st.sampled_from(LETTERS), max_size=12).flatmap(
    lambda text: st.sampled_from(["NFC", "NFD"]).map(lambda form: unicodedata.normalize(form, text))
)


def occurs(words, content, match):
    """The documented rules once more, letter by letter and without a regular expression."""

    def bare(text):
        plain = "".join({"đ": "d", "Đ": "d"}.get(one, unicodedata.normalize("NFD", one)) for one in text)
        return "".join(one for one in plain if not 0x300 <= ord(one) <= 0x36F).lower()

    def words_of(text):
        return "".join(one if one.isalnum() or one == "_" else " " for one in text).split()

    if match == "substring":
        return bare(words) in bare(content)
    phrases = []
    for index, part in enumerate(bare(words).split('"')):
        phrases += [words_of(part)] if index % 2 else [words_of(term) for term in part.split()]
    there = words_of(bare(content))
    return all(
        any(there[at : at + len(phrase)] == phrase for at in range(len(there)))
        for phrase in phrases
        if phrase
    )


@dataclass(frozen=True)
class Drawn:
    contents: list[str]
    queries: list[str]


def drawn() -> Drawn:
    """The same in every run. What is searched for is random, or a part of a text in another spelling."""
    contents: set[str] = set()
    queries: set[str] = set()

    @hypothesis_settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(texts, min_size=20, max_size=20), st.lists(texts, min_size=5, max_size=5), st.randoms())
    def draw(some, asked, rnd):
        contents.update(some)
        queries.update(asked)
        for content in some[:5]:
            part = content[rnd.randrange(3) :][: rnd.randrange(2, 6)]
            queries.add(unicodedata.normalize(rnd.choice(["NFC", "NFD"]), rnd.choice([part, part.upper()])))

    draw()
    return Drawn(sorted(contents), sorted(queries))


async def answers(database, queries):
    """The contents that are found for each query and match that is not refused."""
    found: dict[tuple[str, str], list[str]] = {}
    for query in queries:
        for match in ("words", "substring"):
            with suppress(QueryRefused):
                found[query, match] = sorted([hit.snippet async for hit in hits_of(database, query, match)])
    return found


async def hits_of(database, query, match):
    place = Place(UNTIL)
    while place is not None:
        one = await page(database, query, match=match, before=place, limit=100)
        for hit in one.hits:
            yield hit
        place = one.next


async def test_what_is_found_is_what_the_rules_say_with_and_without_an_index(database, store, monkeypatch):
    texts = drawn()
    for start in range(0, len(texts.contents), 100):
        await record(store, *texts.contents[start : start + 100])

    found = await answers(database, texts.queries)

    assert found == {
        (query, match): [content for content in texts.contents if occurs(query, content, match)]
        for query, match in found
    }
    assert sum(map(len, found.values())) > 300
    monkeypatch.setattr(search_index, "_WORTH_SHARE", 1e9)
    await build_indexes(database, before=date.max)
    try:
        assert (await months_for(database, ["a"])).others == ()
        assert await answers(database, texts.queries) == found
    finally:
        await drop_indexes(database)
