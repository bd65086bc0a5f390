"""What was done and what was seen, on one monotonic clock."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal
from uuid import UUID, uuid5

#: A fault's after-effects on an instance: its own time-outs, and a row lock of a transaction that was cut off.
AFTERMATH_SECONDS = 3.0

OperationKind = Literal["append", "turn", "history", "count", "unchanged", "create", "delete"]
READS = frozenset({"history", "count", "unchanged"})
WRITES = frozenset({"append", "turn"})

#: The answer of a request that had none.
NO_ANSWER = 0


def message_id(session_id: UUID, key: str, index: int) -> UUID:
    """The contract's own rule: what a keyed request stores is known before it is sent."""
    return uuid5(session_id, f"{key}\n{index}")


@dataclass(slots=True)
class Operation:
    """One logical call, from its first attempt to its last answer.

    `status` is that of the last answer. A read of which only the length is known has no `message_ids`.
    """

    kind: OperationKind
    began: float
    ended: float = 0.0
    instance: int = -1
    status: int = NO_ANSWER
    attempts: int = 0
    labelled: bool = False
    left: bool = False
    message_ids: tuple[UUID, ...] = ()
    length: int | None = None
    first_seq: int | None = None
    said: str = ""

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def acked(self) -> bool:
        return self.status in {200, 201}


@dataclass(slots=True)
class Session:
    """`issued` counts the messages that any request may have stored."""

    session_id: UUID
    created: float
    doomed: bool = False
    issued: int = 0
    #: The longest that an unlabelled answer has told of.
    known_seq: int = 0
    operations: list[Operation] = field(default_factory=list)
    texts: dict[UUID, str] = field(default_factory=dict)
    #: Reads share their tuples: a long run has many reads of few lists.
    lists: dict[tuple[str, ...], tuple[UUID, ...]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Fault:
    """`touches`: the servers, instances and links that it disturbs."""

    kind: str
    began: float
    touches: frozenset[str]
    ended: float = float("inf")
    detail: str = ""
    done: bool = False

    def overlaps(self, began: float, ended: float, *, aftermath: float = 0.0) -> bool:
        return self.began <= ended and began <= self.ended + aftermath


@dataclass
class Record:
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    sessions: dict[UUID, Session] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    creates: list[Operation] = field(default_factory=list)
    #: What is wrong with no session in particular.
    wrong: list[str] = field(default_factory=list)
    flips: dict[str, int] = field(default_factory=dict)
    flips_failed: list[str] = field(default_factory=list)


def line_of(value: Operation | Fault, began: float, **more: Any) -> dict[str, Any]:
    """For a line of JSON: times from the start of the run, sets and ids as text."""
    fields = asdict(value) | more
    for name in ("began", "ended"):
        fields[name] = round(min(fields[name] - began, 1e9), 6)
    if "touches" in fields:
        fields["touches"] = sorted(fields["touches"])
    return fields
