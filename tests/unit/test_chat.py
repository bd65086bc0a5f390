"""Values of the domain."""

from datetime import date
from uuid import UUID, uuid4

from app.chat import LEGACY_MONTH, Message, UuidV7Generator, next_chain, session_month
from tests.factories import new_message


def test_new_ids_sort_in_the_order_of_their_making() -> None:
    new_uuid = UuidV7Generator()

    ids = [new_uuid() for _ in range(10_000)]

    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    assert {(made.version, made.variant) for made in ids} == {(7, "specified in RFC 4122")}


def test_a_uuid7_names_the_utc_month_of_its_making() -> None:
    made_in_the_last_millisecond_of_october = UUID("019a3a04-23ff-7000-8000-000000000000")

    assert session_month(made_in_the_last_millisecond_of_october) == date(2025, 10, 1)


def test_an_id_without_a_time_belongs_to_the_legacy_month() -> None:
    assert session_month(uuid4()) == LEGACY_MONTH
    assert session_month(UUID(int=0)) == LEGACY_MONTH


def test_a_uuid7_beyond_the_calendar_belongs_to_the_legacy_month() -> None:
    assert session_month(UUID("ffffffff-ffff-7fff-bfff-ffffffffffff")) == LEGACY_MONTH


def test_the_chain_depends_on_every_message_and_on_their_order() -> None:
    first, second = uuid4(), uuid4()

    chains = {next_chain(bytes(8), ids) for ids in ([], [first], [second], [first, second], [second, first])}

    assert len(chains) == 5
    assert next_chain(next_chain(bytes(8), [first]), [second]) == next_chain(bytes(8), [first, second])


def test_a_line_reads_back_as_the_message_that_wrote_it() -> None:
    message = new_message(
        'lời "nhắn"\n\u2028\t\x01 🙂 \u202eشكرا',
        role="tool",
        metadata={"empty": {}, "none": [], "big": 10**40, "float": 1e16, "tiny": 5e-324},
        request_digest="ab" * 16,
        request_size=3,
    )

    line = message.line(7)

    assert "\n" not in line
    assert Message.from_line(line) == message.at(7)
