"""The layout of a session's value in Redis. Scripts of every version alive rely on it to the byte."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import pytest

from app.chat import Message, next_chain
from app.coherence.ports import TOKEN_ZERO, Entry, GuideEntry
from app.redis_sessions.codec import (
    FIELDS,
    HEAD_BYTES_MAX,
    USER_ID_OFFSET,
    decode,
    decode_head,
    encode,
    lua_offsets,
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
    assert [Message.from_line(line) for line in page[1]] == [
        message.at(seq) for seq, message in enumerate(MESSAGES, 101)
    ]


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
    assert lua_offsets() == (
        "local at = {version=7,owner=8,epoch=9,seq=25,chain=35,pending=51,token=61,first_seq=77,"
        "first_offset=87,session_id=113,created_at=165,last_activity=208,user_id=244}\n"
        "local width = {version=1,owner=1,epoch=16,seq=10,chain=16,pending=10,token=16,first_seq=10,"
        "first_offset=10,session_id=36,created_at=24,last_activity=24}\n"
    )


def test_an_empty_session_is_json_too() -> None:
    value = encode(new_row(SESSION_ID), epoch=EPOCH, lines=[])

    entry = decode(value, SESSION_ID)

    assert json.loads(value)["messages"] == []
    assert isinstance(entry, Entry)
    assert (entry.first_seq, entry.body, entry.newest(10, None)) == (1, b"", (1, ()))


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


def test_a_value_in_the_guides_format_is_told_apart() -> None:
    assert decode(guide_value(SESSION_ID, "a", "b"), SESSION_ID) == GuideEntry(session_id=SESSION_ID)
    assert decode_head(guide_value(SESSION_ID, "a", "b"), SESSION_ID) is None


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

    found = None if page is None else [Message.from_line(line).seq for line in page[1]]
    assert found == seqs
