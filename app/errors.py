"""One class a condition that a caller can act on. No HTTP and no drivers in here.

Stores raise these, always `from` the driver's own error; `app/api/problems.py` gives each its status.
A text says what happened, then the detail, then the hint; `code` is stable, the text is not.
"""

from typing import ClassVar


class ChatError(Exception):
    """The root. The class docstring is the default text; `code` is what programs read."""

    code: ClassVar[str] = "internal"

    def __init__(self, detail: str | None = None, *, hint: str | None = None) -> None:
        self.detail = detail or (self.__doc__ or "").splitlines()[0]
        self.hint = hint
        super().__init__(self.detail if hint is None else f"{self.detail} ({hint})")


class SessionNotFound(ChatError):
    """Session not found"""

    code = "session_not_found"


class IdempotencyKeyReused(ChatError):
    """this idempotency key was used in this session for another request"""

    code = "idempotency_key_reused"


class SeqMismatch(ChatError):
    """the session has moved on: its last message is not the one named by If-Match"""

    code = "seq_mismatch"

    def __init__(self, current_seq: int) -> None:
        self.current_seq = current_seq
        super().__init__(
            f"the session's last message has seq {current_seq}, not the one named by If-Match",
            hint="read the history and decide again",
        )


class NotYetVisible(ChatError):
    """the session has no message with the seq asked for by min_seq"""

    code = "not_yet_visible"


class SessionTooLarge(ChatError):
    """the session has reached its size limit in Redis"""

    code = "session_too_large"


class TurnTakenOver(ChatError):
    """a retry of this request took over while the assistant was thinking; its answer counts"""

    code = "turn_taken_over"


class AssistantFailed(ChatError):
    """the assistant gave no answer"""

    code = "assistant_failed"


class AssistantTimedOut(ChatError):
    """the assistant did not answer in time"""

    code = "assistant_timed_out"


class Unavailable(ChatError):
    """the service can't answer now"""

    code = "unavailable"
    retry_after_seconds: float = 1

    def __init__(
        self, detail: str | None = None, *, hint: str | None = None, retry_after_seconds: float | None = None
    ) -> None:
        if retry_after_seconds is not None:
            self.retry_after_seconds = retry_after_seconds
        super().__init__(detail, hint=hint)


class Overloaded(Unavailable):
    """more waits here than can be carried out soon: the request was refused and nothing of it was kept"""

    code = "overloaded"


class TurnInProgress(Unavailable):
    """a request with this idempotency key is still running"""

    code = "turn_in_progress"


class DurableStoreUnavailable(Unavailable):
    """PostgreSQL can't be reached: the request was refused and nothing of it was kept"""

    code = "durable_store_unavailable"


class CommitUnknown(DurableStoreUnavailable):
    """the connection to PostgreSQL broke during the commit: the write may or may not be stored

    The same request with the same idempotency key resolves it.
    """

    def __init__(self) -> None:
        super().__init__(hint="retry with the same Idempotency-Key: it appends once")


class RedisUnavailable(Unavailable):
    """Redis can't be reached, and in Redis-only mode it is the source of truth"""

    code = "redis_unavailable"


class CacheFull(Unavailable):
    """Redis has no memory left for this write: nothing of it was kept"""

    code = "cache_full"


class FreshnessUnknown(Unavailable):
    """PostgreSQL can't be reached, so the cached copy can't be shown to be current"""

    code = "freshness_unknown"


class AdoptionPending(Unavailable):
    """Redis holds this session for itself; it must be adopted into PostgreSQL before it can be used

    Raised for an entry that Redis owns and for an entry in the guide's format whose session has no row.
    Nothing overwrites or removes such an entry.
    """

    code = "adoption_pending"


class Unadoptable(AdoptionPending):
    """PostgreSQL can't take this session over from Redis as it is

    It waits in Redis, untouched, until somebody mends or removes it.
    """


class ModeRefused(ChatError):
    """the mode was not changed"""

    code = "mode_refused"


class StartRefused(ChatError):
    """the service can't start as it is set up"""

    code = "start_refused"


class UnknownReport(ChatError):
    """there is no report of that name"""

    code = "unknown_report"


class RangeRefused(ChatError):
    """a report can't be made over that range of time"""

    code = "range_refused"


class UnknownTimezone(ChatError):
    """there is no time zone of that name"""

    code = "unknown_timezone"


class TimezoneRefused(ChatError):
    """a report can't be made in that time zone"""

    code = "timezone_refused"


class GranularityRefused(ChatError):
    """a report can't be made in periods of that length"""

    code = "granularity_refused"


class UserRefused(ChatError):
    """a report can't be made of one user"""

    code = "user_refused"


class QueryRefused(ChatError):
    """that can't be searched for"""

    code = "query_refused"


class ArchiveRefused(ChatError):
    """the files can't be written or read"""

    code = "archive_refused"


class HistoryDiffers(ChatError):
    """the session is stored with another history: neither is the beginning of the other"""

    code = "history_differs"
