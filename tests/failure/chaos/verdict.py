"""What a run has shown: every session's history checked, every figure counted."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from tests.failure.chaos.faults import KINDS
from tests.failure.chaos.record import AFTERMATH_SECONDS, READS, WRITES, Fault, Operation, Record, Session
from tests.failure.checker import Log, Read, Write, violations

#: No fault lasts longer; what bounds the search for those around a moment.
_FAULT_SECONDS_MAX = 60.0

#: A hold after a change of trust, and the time-out before it, may outlast the fault that caused them.
_PAUSE_AFTER_FAULT_SECONDS = 2.0

#: A write that took less did not wait for anything.
_PAUSE_SECONDS_MIN = 0.02

_BRIEF = frozenset(kind.name for kind in KINDS if kind.brief)
_REDIS = frozenset(kind.name for kind in KINDS if kind.scope in {"redis", "redis links"})


@dataclass
class Verdict:
    #: Each line begins with what kind of violation it is.
    wrong: list[str] = field(default_factory=list)
    #: The sessions with a violation, for the history that is kept.
    suspects: set[UUID] = field(default_factory=set)
    operations: Counter[str] = field(default_factory=Counter)
    #: Reads that failed with nothing to excuse them. Violations, except where Redis holds the sessions.
    failed_reads: list[str] = field(default_factory=list)
    refused_writes_undisturbed: int = 0
    #: Acknowledged under a key whose first attempt had no answer, or a 503.
    retried_writes_acked: int = 0
    write_pauses: dict[str, float] = field(default_factory=dict)
    longest_read_seconds: float = 0.0

    @property
    def kinds(self) -> Counter[str]:
        """How many violations of each kind: what stands before the colon."""
        return Counter(line.partition(":")[0] for line in self.wrong)


class _Faults:
    """Which faults were around at a time: a run has thousands of them, and a million operations."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._faults = sorted(faults, key=lambda fault: fault.began)
        self._began = [fault.began for fault in self._faults]

    def around(self, began: float, ended: float, aftermath: float) -> list[Fault]:
        first = bisect_right(self._began, began - aftermath - _FAULT_SECONDS_MAX)
        last = bisect_right(self._began, ended)
        return [one for one in self._faults[first:last] if one.overlaps(began, ended, aftermath=aftermath)]

    def disturb(self, operation: Operation, touched: frozenset[str] | None = None) -> bool:
        """Whether an instance had trouble that excuses it; with `touched`, trouble of that."""
        if touched is None:
            index = operation.instance
            touched = frozenset({"postgres", f"app {index}", f"postgres link {index}"})
        around = self.around(operation.began, operation.ended, AFTERMATH_SECONDS)
        return any(not fault.touches.isdisjoint(touched) for fault in around)


def judge(
    record: Record, truth: Mapping[UUID, Sequence[UUID]], *, instances: int, reads_may_fail: bool
) -> Verdict:
    """`truth`: the messages of each session, in PostgreSQL's order; nothing for one that has no row."""
    verdict = Verdict(wrong=list(record.wrong))
    faults = _Faults(record.faults)
    for session in record.sessions.values():
        wrong = [*session.wrong, *_sequence(session, truth, record.began)]
        if wrong:
            verdict.suspects.add(session.session_id)
            verdict.wrong += [f"{line} (session {session.session_id})" for line in wrong]
        for operation in session.operations:
            verdict.operations[_counted_as(operation)] += 1
            if operation.kind in WRITES and operation.acked and operation.attempts > 1:
                verdict.retried_writes_acked += 1
            if line := _failed_read(operation, session, faults, record.began):
                verdict.failed_reads.append(line)
    for operation in record.creates:
        verdict.operations["creates" if operation.acked else "unknown creates"] += 1
    if not reads_may_fail:
        verdict.wrong += verdict.failed_reads
    _measure(verdict, record, faults, instances)
    return verdict


def _counted_as(operation: Operation) -> str:
    if operation.kind in READS:
        if operation.labelled:
            return "labelled reads"
        return "reads" if operation.status in {200, 304, 404} else "reads refused or cut off"
    if operation.kind == "delete":
        return "deletes" if operation.acked else "unknown deletes"
    if operation.acked:
        return "acked writes"
    return "writes to deleted sessions" if operation.status == 404 else "unknown writes"


def _sequence(session: Session, truth: Mapping[UUID, Sequence[UUID]], zero: float) -> list[str]:
    """`zero`: the start of the run, so that a violation's time can be found in its history."""
    return _deletion(session, truth, zero) if session.doomed else _history(session, truth, zero)


def _history(session: Session, truth: Mapping[UUID, Sequence[UUID]], zero: float) -> list[str]:
    final = tuple(truth.get(session.session_id, ()))
    log, labelled, wrong = Log(), Log(), []
    if session.session_id not in truth:
        wrong.append("lost: the session has no row")
    for operation in session.operations:
        if operation.kind in WRITES:
            began = operation.began - zero
            acked = operation.ended - zero if operation.acked else None
            log.writes += [Write(one, began, acked) for one in operation.message_ids]
            labelled.writes += [Write(one, began, None) for one in operation.message_ids]
            if operation.acked and operation.kind == "append":
                wrong += _place(operation, final)
        elif operation.length is not None:
            read = _read(operation, final, zero)
            if read is None:
                wrong.append(f"no prefix: {operation.length} messages were told of, there are {len(final)}")
            else:
                (labelled if operation.labelled else log).reads.append(read)
    wrong += violations(log, final)
    # What an answer that says it may be old must still be: a beginning of the truth.
    wrong += [
        f"labelled read, {line}"
        for line in violations(labelled, final)
        if not line.startswith(("stale", "non-monotonic", "not sent", "duplicate"))
    ]
    return wrong


def _place(operation: Operation, final: tuple[UUID, ...]) -> list[str]:
    """An acknowledgement names the place of its message; a message that is not there is lost, said elsewhere."""
    [message_id] = operation.message_ids
    if message_id not in final or operation.first_seq == final.index(message_id) + 1:
        return []
    return [f"wrong seq: {operation.first_seq} was acknowledged, it is {final.index(message_id) + 1}"]


def _read(operation: Operation, final: tuple[UUID, ...], zero: float) -> Read | None:
    ids = operation.message_ids
    if operation.kind != "history":  # only a length, which stands for the messages up to there
        assert operation.length is not None
        if operation.length > len(final):
            return None
        ids = final[: operation.length]
    return Read(ids, operation.began - zero, operation.ended - zero)


def _deletion(session: Session, truth: Mapping[UUID, Sequence[UUID]], zero: float) -> list[str]:
    """From an acknowledged delete on, or from the first answer that it is gone, a session stays gone."""
    gone_at = min(
        (
            operation.ended
            for operation in session.operations
            if (operation.kind == "delete" and operation.acked)
            or (operation.status == 404 and not operation.labelled)
        ),
        default=None,
    )
    if gone_at is None:
        return []
    wrong = [
        f"resurrected: {operation.kind} answered {operation.status}, begun at {operation.began - zero:.3f} s, "
        f"gone since {gone_at - zero:.3f} s"
        for operation in session.operations
        if operation.began > gone_at
        and operation.status in {200, 304}
        and not operation.labelled
        and operation.kind != "delete"
    ]
    if session.session_id in truth:
        wrong.append("resurrected: the session has a row at the end")
    return wrong


def _failed_read(operation: Operation, session: Session, faults: _Faults, zero: float) -> str | None:
    if operation.kind not in READS or operation.left or operation.status in {200, 304}:
        return None
    if operation.status == 404 and session.doomed:
        return None
    if faults.disturb(operation):
        return None
    near = ", ".join(fault.kind for fault in faults.around(operation.began, operation.ended, 2.0))
    return (
        f"failed read: at {operation.began - zero:.3f} s on instance {operation.instance}: "
        f"{operation.said or operation.status} after {operation.seconds:.3f} s; around it: {near or 'nothing'}"
    )


def _measure(verdict: Verdict, record: Record, faults: _Faults, instances: int) -> None:
    """The longest read, and the longest write by what happened to Redis, where only Redis was in trouble."""
    all_of_postgres = frozenset(
        {
            "postgres",
            *(f"app {index}" for index in range(instances)),
            *(f"postgres link {index}" for index in range(instances)),
        }
    )
    for session in record.sessions.values():
        for operation in session.operations:
            if operation.left:
                continue
            if operation.kind in READS and operation.seconds > verdict.longest_read_seconds:
                if not faults.disturb(operation):
                    verdict.longest_read_seconds = operation.seconds
            elif operation.kind in WRITES and not session.doomed:
                _measure_write(verdict, operation, faults, all_of_postgres)


def _measure_write(
    verdict: Verdict, operation: Operation, faults: _Faults, all_of_postgres: frozenset[str]
) -> None:
    if operation.acked and operation.seconds < _PAUSE_SECONDS_MIN:
        return
    if faults.disturb(operation, all_of_postgres):
        return
    if not operation.acked:
        verdict.refused_writes_undisturbed += 1
        return
    around = faults.around(operation.began, operation.ended, _PAUSE_AFTER_FAULT_SECONDS)
    around = [fault for fault in around if fault.kind in _REDIS]
    # What takes Redis away is to blame rather than what merely was there too.
    around = [fault for fault in around if fault.kind not in _BRIEF] or around
    kind = around[-1].kind if around else "none"
    verdict.write_pauses[kind] = max(verdict.write_pauses.get(kind, 0.0), operation.seconds)
