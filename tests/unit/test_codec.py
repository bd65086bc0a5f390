"""The layout of a session's value in Redis. Scripts of every version alive rely on it to the byte."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import pytest

from app.chat import messages_of, next_chain
from app.coherence.ports import TOKEN_ZERO, Entry, GuideEntry, Owner, Unreadable
from app.redis_sessions.codec import (
    FIELDS,
    HEAD_BYTES_MAX,
    USER_ID_OFFSET,
    decode,
    decode_head,
    encode,
    with_layout,
)
from tests.factories import guide_value, new_message, new_row

GOLDEN = Path(__file__).with_name("golden_entry.json")

SESSION_ID = UUID("019a3a04-23ff-7000-8000-00000000abcd")
EPOCH = "00112233445566ff"
MOMENT = datetime(2025, 11, 14, 10, 30, 0, 123000, UTC)
MESSAGES = [
    new_message(
        'Điều kiện tham gia đấu thầu?\n"]}"',
        message_id=UUID("019a3a04-2400-7000-8000-000000000001"),
        created_at=MOMENT,
        metadata={"source": "web", "empty": [], "n": 1e16},
        request_digest="0f" * 16,
        request_size=2,
    ),
    new_message(
        "Theo Điều 5. 🙂",
        role="assistant",
        message_id=UUID("019a3a04-2400-7000-8000-000000000002"),
        created_at=MOMENT,
        metadata={"sources": [], "processing_time_ms": 3500},
    ),
]
ROW = new_row(
    SESSION_ID,
    user_id='user"Đ',
    created_at=MOMENT,
    message_count=102,
    chain=next_chain(bytes(8), [message.message_id for message in MESSAGES]),
)
LINES = [message.line(seq) for seq, message in enumerate(MESSAGES, 101)]

HEADS = ("version", "owner", "epoch", "seq", "chain", "pending", "token", "first_seq", "first_offset")


def golden() -> bytes:
    return encode(ROW, epoch=EPOCH, lines=LINES, pending=103, token="fedcba9876543210")


def field(value: bytes, name: str) -> str:
    offset, width = FIELDS[name]
    return value[offset : offset + width].decode()


def test_a_session_is_encoded_as_the_golden_file_shows() -> None:
    assert golden() == GOLDEN.read_bytes()


def test_the_golden_file_is_json_that_people_can_read() -> None:
    value = json.loads(GOLDEN.read_bytes())

    assert list(value) == ["_c", "session_id", "created_at", "last_activity", "user_id", "messages"]
    assert value["session_id"] == str(SESSION_ID)
    assert value["user_id"] == 'user"Đ'
    assert [message["content"] for message in value["messages"]] == [one.content for one in MESSAGES]
    assert GOLDEN.read_bytes().count(b"\n") == 2


def test_the_golden_file_reads_back() -> None:
    entry = decode(GOLDEN.read_bytes(), SESSION_ID)

    assert entry == Entry(
        owner="postgres",
        epoch=EPOCH,
        chain=ROW.chain,
        pending=103,
        token="fedcba9876543210",
        first_seq=101,
        session=ROW.session,
        body=",\n".join(LINES).encode(),
    )
    page = entry.newest(2, None)
    assert page is not None
    assert messages_of(page[1]) == tuple(message.at(seq) for seq, message in enumerate(MESSAGES, 101))


def test_every_field_stands_at_its_offset() -> None:
    value = GOLDEN.read_bytes()

    fields = {name: field(value, name) for name in FIELDS}

    assert fields == {
        "version": "1",
        "owner": "p",
        "epoch": EPOCH,
        "seq": "0000000102",
        "chain": ROW.chain.hex(),
        "pending": "0000000103",
        "token": "fedcba9876543210",
        "first_seq": "0000000101",
        "first_offset": f"{value.index(b'{', 1):010d}",
        "session_id": str(SESSION_ID),
        "created_at": "2025-11-14T10:30:00.123Z",
        "last_activity": "2025-11-14T10:30:00.123Z",
    }
    assert "".join(fields[name] for name in HEADS) == json.loads(value)["_c"]
    assert value[USER_ID_OFFSET:].startswith('"user\\"Đ","messages":[\n{'.encode())


def test_the_offsets_are_what_they_were() -> None:
    """Values outlive a deployment: another offset needs another version."""
    assert {name: (offset, width) for name, (offset, width) in FIELDS.items()} == {
        "version": (7, 1),
        "owner": (8, 1),
        "epoch": (9, 16),
        "seq": (25, 10),
        "chain": (35, 16),
        "pending": (51, 10),
        "token": (61, 16),
        "first_seq": (77, 10),
        "first_offset": (87, 10),
        "session_id": (113, 36),
        "created_at": (165, 24),
        "last_activity": (208, 24),
    }
    assert USER_ID_OFFSET == 244


def test_a_script_has_the_offsets_written_out() -> None:
    script = "local a = at.user_id .. width.epoch .. field(head, 'seq') .. between(whole, 'chain', 'token')"

    assert (
        with_layout(script) == "local a = 244 .. 16 .. string.sub(head, 26, 35) .. string.sub(whole, 36, 61)"
    )


@pytest.mark.parametrize(
    "wrong", ["at.sequence", "width.user_id", "field(head, 'x')", "between(head, 'seq', 'x')"]
)
def test_a_script_that_asks_for_what_is_no_field_is_refused(wrong: str) -> None:
    with pytest.raises(KeyError):
        with_layout(f"local a = {wrong}")


def test_an_empty_session_is_json_too() -> None:
    value = encode(new_row(SESSION_ID), epoch=EPOCH, lines=[])

    entry = decode(value, SESSION_ID)

    assert json.loads(value)["messages"] == []
    assert isinstance(entry, Entry)
    assert (entry.first_seq, entry.body, entry.newest(10, None)) == (1, b"", (1, b""))


@pytest.mark.parametrize("user_id", ["\x01" * 256, "🙂" * 256, '"' * 256, "\u2028\\\n"])
def test_the_head_of_any_user_fits_the_bytes_that_are_read_for_it(user_id: str) -> None:
    row = new_row(SESSION_ID, user_id=user_id)
    value = encode(row, epoch=EPOCH, lines=["{}" * 5000])

    session = decode_head(value[: HEAD_BYTES_MAX + 1], SESSION_ID)

    assert session == row.session


def test_another_sessions_value_is_none() -> None:
    other = replace(ROW.session, session_id=UUID(int=7)).session_id

    assert decode(golden(), other) is None
    assert decode_head(golden(), other) is None
    assert decode(guide_value(SESSION_ID, "a"), other) is None


def test_a_value_that_was_cut_anywhere_is_none() -> None:
    value = golden()

    read = [decode(value[:length], SESSION_ID) for length in range(len(value))]

    assert set(read) == {None}


def test_a_head_that_was_cut_anywhere_is_none_and_raises_nothing() -> None:
    value = golden()
    head = value.index(b"\n")

    read = [decode_head(value[:length], SESSION_ID) for length in range(head + 1)]

    assert set(read) == {None}
    assert decode_head(value[: head + 1], SESSION_ID) == ROW.session


def test_a_value_that_lost_a_line_is_none() -> None:
    head, first, second = golden().split(b"\n")

    assert decode(b"\n".join((head, first.removesuffix(b",") + b"]}")), SESSION_ID) is None
    assert decode(b"\n".join((head, second)), SESSION_ID) is None
    assert decode(b"\n".join((head, first, first, second)), SESSION_ID) is None


def spliced(value: bytes, **fields: str) -> bytes:
    for name, text in fields.items():
        offset, width = FIELDS[name]
        value = value[:offset] + text.rjust(width, "0").encode() + value[offset + width :]
    return value


def torn(owner: Owner) -> dict[str, bytes]:
    """Each is wrong in one thing only."""
    lines = [new_message(text).line(seq) for seq, text in enumerate("abc", 1)]
    row = replace(new_row(SESSION_ID, message_count=3), owner=owner)
    whole = encode(row, epoch=EPOCH, lines=lines)
    return {
        "begins within a line": spliced(whole, first_offset=str(whole.index(b"\n") + 5)),
        "of a version that is not known": spliced(whole, version="2"),
        "another word between two fields": whole.replace(b'"created_at"', b'"created_on"', 1),
        "the lines of other messages": encode(row, epoch=EPOCH, lines=lines[:2]),
        "a line is missing between two": spliced(encode(row, epoch=EPOCH, lines=lines[::2]), first_seq="1"),
    }


@pytest.mark.parametrize("name", torn("postgres"))
def test_a_value_that_is_not_whole_is_none_or_waits_for_a_person(name: str) -> None:
    """What Redis owns is nowhere else, so it is looked at in full, however it is read."""
    of_postgres, of_redis = torn("postgres")[name], torn("redis")[name]

    assert decode(of_postgres, SESSION_ID) is None
    assert isinstance(decode(of_redis, SESSION_ID), Unreadable)
    assert isinstance(decode(of_redis, SESSION_ID, counts=False), Unreadable)
    assert decode(of_redis, UUID(int=7)) is None


@pytest.mark.parametrize("max_messages", [2, 3])
def test_a_page_out_of_lines_that_were_not_counted_is_none_where_one_is_missing(max_messages: int) -> None:
    """The newest two begin with the wrong one, all three are too few; the newest one is there."""
    entry = decode(torn("postgres")["a line is missing between two"], SESSION_ID, counts=False)

    assert isinstance(entry, Entry)
    assert entry.newest(max_messages, None) is None
    assert entry.newest(1, None) is not None


def test_a_page_out_of_lines_that_were_not_counted_is_none_where_another_ends_it() -> None:
    """Of messages 1, 2, 3, 5, 5: below 5 the newest three begin with 2, and end with what is not 4."""
    lines = [new_message(str(seq)).line(seq) for seq in (1, 2, 3, 5, 5)]
    row = new_row(SESSION_ID, message_count=5)
    entry = decode(encode(row, epoch=EPOCH, lines=lines), SESSION_ID, counts=False)

    assert isinstance(entry, Entry)
    assert entry.newest(3, 5) is None
    assert entry.newest(2, 4) is not None


def test_no_changed_byte_makes_decoding_raise() -> None:
    value = golden()

    read = [
        decode(value[:at] + byte + value[at + 1 :], SESSION_ID)
        for at in range(value.index(b"\n") + 2)
        for byte in (b"\x00", b"\xff", b"9", b"\n", b'"')
    ]

    assert {type(one) for one in read} == {Entry, GuideEntry, type(None)}


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"garbage",
        b"null",
        b"1",
        b'"text"',
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"session_id":1,"messages":[]}',
        b'{"session_id":null,"messages":[]}',
        b'{"session_id":"019a3a04-23ff-7000-8000-00000000abcd"}',
        b'{"session_id":"019a3a04-23ff-7000-8000-00000000abcd","messages":{}}',
        b'{"session_id":"019a3a04-23ff-7000-8000-00000000abcd","messages":[]',
        b'{"session_id":' + b"1" * 5000 + b"}",
    ],
    ids=lambda garbage: garbage[:20],
)
def test_garbage_is_none(garbage: bytes) -> None:
    assert decode(garbage, SESSION_ID) is None
    assert decode_head(garbage, SESSION_ID) is None


@pytest.mark.parametrize("field", ["created_at", "last_activity"])
@pytest.mark.parametrize("time", [b"0001-01-01T00:00:00+1400", b"9999-12-31T23:59:59-1400"])
def test_a_time_beyond_the_calendar_is_none(field: str, time: bytes) -> None:
    """A hand wrote it: an offset leads out of the calendar's ends."""
    offset, width = FIELDS[field]
    value = golden()
    value = value[:offset] + time + value[offset + width :]

    assert decode(value, SESSION_ID) is None
    assert decode_head(value, SESSION_ID) is None


# The guide's format


def guide(*messages: object, **fields: object) -> bytes:
    value = {
        "session_id": str(SESSION_ID),
        "user_id": "user123",
        "created_at": "2025-11-14T10:30:00.123456",
        "last_activity": "2025-11-14T10:31:00",
        "messages": list(messages),
    }
    return json.dumps({**value, **fields}).encode()


def said(content: object, **fields: object) -> dict[str, object]:
    return {"role": "user", "content": content, "timestamp": "2025-11-14T10:30:00", "metadata": {}, **fields}


def read(value: bytes) -> GuideEntry:
    entry = decode(value, SESSION_ID)
    assert isinstance(entry, GuideEntry)
    return entry


def ids(value: bytes) -> list[UUID]:
    return [message.message_id for message in read(value).messages]


def test_a_value_in_the_guides_format_is_read_with_its_user_its_times_and_its_messages() -> None:
    entry = read(guide(said("a"), said("b", role="assistant", metadata={"n": 1}), user_id="owner"))

    assert (
        entry.session
        == new_row(
            SESSION_ID,
            user_id="owner",
            created_at=MOMENT,
            last_activity=datetime(2025, 11, 14, 10, 31, tzinfo=UTC),
            message_count=2,
        ).session
    )
    assert [(one.role, one.content, one.metadata) for one in entry.messages] == [
        ("user", "a", "{}"),
        ("assistant", "b", '{"n":1}'),
    ]
    assert {one.created_at for one in entry.messages} == {datetime(2025, 11, 14, 10, 30, tzinfo=UTC)}
    assert {one.request_digest for one in entry.messages} == {None}
    assert decode_head(guide(said("a")), SESSION_ID) is None


def test_two_messages_that_carry_one_id_are_two() -> None:
    """As a hand copies them. One of them would be taken for known, and its words be lost."""
    own = str(UUID(int=7))

    first, second, third = ids(guide(*(said(text, message_id=own) for text in "abc")))

    assert first == UUID(own)
    assert len({first, second, third}) == 3


@pytest.mark.parametrize(
    "text",
    [
        "2025-11-14T10:30:00",
        "2025-11-14T10:30:00Z",
        "2025-11-14T17:30:00+07:00",
        "2025-11-14 10:30:00.000999",
    ],
)
def test_a_guides_time_without_an_offset_is_utc(text: str) -> None:
    entry = read(guide(said("a", timestamp=text), created_at=text, last_activity=text))

    moment = datetime(2025, 11, 14, 10, 30, tzinfo=UTC)
    times = entry.session.created_at, entry.session.last_activity, entry.messages[0].created_at
    assert times == (moment, moment, moment)


@pytest.mark.parametrize("text", [None, 7, "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"])
def test_a_guides_time_that_is_none_is_that_of_the_session(text: object) -> None:
    entry = read(guide(said("a", timestamp=text), last_activity=text))

    assert (entry.session.last_activity, entry.messages[0].created_at) == (MOMENT, MOMENT)


def test_a_guides_message_has_the_same_id_at_every_look() -> None:
    messages = [said(text) for text in "abcd"]

    first = ids(guide(*messages[:3]))
    grown, dropped, moved = ids(guide(*messages)), ids(guide(*messages[1:])), ids(guide(messages[2]))

    assert len(set(grown)) == 4
    assert grown[:3] == first
    assert dropped == grown[1:]
    assert moved == [grown[2]]


def test_a_guides_message_has_the_same_id_however_its_json_was_written() -> None:
    message = said("Điều", metadata={"z": 1, "a": 2})
    turned = dict(reversed(list(message.items())))

    assert ids(guide(message)) == ids(guide(turned))
    assert ids(guide(message)) == ids(json.dumps(json.loads(guide(message)), indent=2).encode())


@pytest.mark.parametrize(
    "change",
    [
        {"content": "b"},
        {"role": "assistant"},
        {"timestamp": "2025-11-14T10:30:01"},
        {"metadata": {"a": 1}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_guides_messages_that_differ_in_anything_have_different_ids(change: dict[str, object]) -> None:
    one, other = ids(guide(said("a"), said("a") | change))

    assert one != other


def test_equal_messages_of_a_guides_session_have_different_ids_and_keep_them() -> None:
    once, twice, thrice = (ids(guide(*[said("a")] * times)) for times in (1, 2, 3))

    assert len(set(thrice)) == 3
    assert (once, twice) == (thrice[:1], thrice[:2])


def test_equal_messages_of_two_guides_sessions_have_different_ids() -> None:
    other_id = UUID(int=7)
    other = decode(guide(said("a"), session_id=str(other_id)), other_id)

    assert isinstance(other, GuideEntry)
    assert other.messages[0].message_id != ids(guide(said("a")))[0]


def test_a_guides_role_that_is_none_of_ours_is_kept_in_the_metadata() -> None:
    entry = read(guide(said("a", role="bot", metadata={"n": 1}), said("b", role=None)))

    assert [(one.role, json.loads(one.metadata)) for one in entry.messages] == [
        ("system", {"n": 1, "role": "bot"}),
        ("system", {"role": None}),
    ]


def test_what_a_guides_message_has_in_another_form_is_kept() -> None:
    messages = [said("a", metadata=[1]), said("a", metadata="x"), said({"a": 1}), said(None)]
    messages += [{"role": "user", "content": "a"}, said("a", metadata=None)]

    entry = read(guide(*messages))

    assert [(one.content, one.metadata) for one in entry.messages] == [
        ("a", '{"metadata":[1]}'),
        ("a", '{"metadata":"x"}'),
        ('{"a":1}', "{}"),
        ("null", "{}"),
        ("a", "{}"),
        ("a", "{}"),
    ]


@pytest.mark.parametrize(
    "value",
    [
        guide("text"),
        guide(7),
        guide(None),
        guide({"role": "user"}),
        guide({"content": "a"}),
        guide(said("a", metadata={"n": float("nan")})),
        guide(said("\ud800")),
        guide(said("a", timestamp="yesterday")),
        guide(said("a"), user_id=None),
        guide(said("a"), created_at="yesterday"),
        guide(said("a"), last_activity="yesterday"),
        encode(replace(ROW, owner="redis"), epoch=EPOCH, lines=LINES)[:-1],
        encode(replace(ROW, owner="redis"), epoch=EPOCH, lines=LINES).replace(b"\n", b" ", 1),
    ],
)
def test_words_that_can_not_be_read_back_are_told_apart_from_nothing(value: bytes) -> None:
    assert isinstance(decode(value, SESSION_ID), Unreadable)


@pytest.mark.parametrize(
    "value",
    [
        guide(messages=7),
        guide(messages=None),
        guide(messages={"a": 1}),
        guide(user_id=None),
        guide(user_id=7),
        guide(created_at="yesterday"),
        guide(last_activity="yesterday"),
        guide(session_id=7),
        guide(session_id=str(UUID(int=7))),
        guide(said("a"))[:-1],
        b'{"a":' * 100_000,
    ],
)
def test_what_is_not_the_guides_format_is_no_entry(value: bytes) -> None:
    assert decode(value, SESSION_ID) is None


def test_only_what_redis_owns_begins_after_the_first_message() -> None:
    ours = decode(encode(ROW, epoch=EPOCH, lines=LINES), SESSION_ID)
    redis_owned = decode(encode(replace(ROW, owner="redis"), epoch=EPOCH, lines=LINES), SESSION_ID)

    assert isinstance(ours, Entry)
    assert isinstance(redis_owned, Entry)
    assert (ours.session.first_available_seq, redis_owned.session.first_available_seq) == (1, 101)
    assert (ours.owner, redis_owned.owner, ours.token) == ("postgres", "redis", TOKEN_ZERO)


@pytest.mark.parametrize(
    ("max_messages", "before_seq", "seqs"),
    [
        (1, None, [5]),
        (3, None, [3, 4, 5]),
        (2, 5, [3, 4]),
        (1, 4, [3]),
        (10, 3, None),
        (1, 3, None),
        (4, None, None),
        (10, 1, []),
        (1, 99, [5]),
    ],
)
def test_a_window_gives_a_page_only_where_it_holds_all_of_it(
    max_messages: int, before_seq: int | None, seqs: list[int] | None
) -> None:
    lines = [new_message(f"{seq},\n").line(seq) for seq in range(3, 6)]
    entry = decode(encode(new_row(SESSION_ID, message_count=5), epoch=EPOCH, lines=lines), SESSION_ID)
    assert isinstance(entry, Entry)

    page = entry.newest(max_messages, before_seq)

    found = None if page is None else [message.seq for message in messages_of(page[1])]
    assert found == seqs
