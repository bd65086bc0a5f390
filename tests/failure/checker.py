"""Whether a history of one session is linearizable: decidable, because a session is an append-only list.

The order of the list in PostgreSQL at the end is the order of the writes (Elle's list-append argument, Kingsbury
and Alvaro, VLDB 2020, on one key). Sessions are independent, so each is checked by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID


@dataclass(frozen=True, slots=True)
class Write:
    """`acked` is when its caller was answered; None where the caller never knew."""

    message_id: UUID
    began: float
    acked: float | None


@dataclass(frozen=True, slots=True)
class Read:
    message_ids: tuple[UUID, ...]
    began: float
    ended: float


@dataclass
class Log:
    """What the clients of one session saw, on one monotonic clock."""

    writes: list[Write] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)


def violations(log: Log, final: Sequence[UUID]) -> list[str]:
    """What is wrong with a history that ended in `final`; empty for a linearizable one."""
    place = {message_id: index for index, message_id in enumerate(final)}
    began = {write.message_id: write.began for write in log.writes}
    wrong = [f"not sent: nobody wrote {message_id}" for message_id in final if message_id not in began]
    if len(place) != len(final):
        wrong.append("duplicate: a message stands in the session twice")
    lost = [
        write.message_id for write in log.writes if write.acked is not None and write.message_id not in place
    ]
    wrong += [f"lost: {message_id} was acknowledged" for message_id in lost]
    for read in log.reads:
        if read.message_ids != tuple(final[: len(read.message_ids)]):
            wrong.append(f"no prefix: a read of {len(read.message_ids)} messages")
        if any(began.get(message_id, 0.0) > read.ended for message_id in read.message_ids):
            wrong.append("a read saw a message before it was sent")
    # The longest list that anybody knew of when a read began: acknowledged, or read before.
    known = sorted(
        [
            (write.acked, place[write.message_id] + 1, "stale")
            for write in log.writes
            if write.acked is not None and write.message_id in place
        ]
        + [(read.ended, len(read.message_ids), "non-monotonic") for read in log.reads]
    )
    longest = {"stale": 0, "non-monotonic": 0}
    position = 0
    for read in sorted(log.reads, key=lambda one: one.began):
        while position < len(known) and known[position][0] < read.began:
            _, length, how = known[position]
            longest[how] = max(longest[how], length)
            position += 1
        length = len(read.message_ids)
        if how := next((how for how in longest if length < longest[how]), None):
            wrong.append(
                f"{how}: a read of {length} messages when {longest[how]} were known, begun at {read.began:.3f} s"
            )
    return wrong
