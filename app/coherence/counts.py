"""What happened in this process, counted: for `/metrics`, and for whoever looks at 3 a.m."""

from dataclasses import dataclass


@dataclass(slots=True)
class Counts:
    """Only ever grow. One object a process, given to all who count."""

    #: Reads that one command in Redis answered.
    cache_hits: int = 0
    #: Entries that were written anew from PostgreSQL.
    cache_fills: int = 0
    #: Entries that were found dirty or of an older epoch, and equal to their row.
    cache_validations: int = 0
    #: Reads that could not trust the cache when Redis had answered: they went to PostgreSQL.
    lease_expired_reads: int = 0
    #: Answers labelled `unverified`.
    unverified_reads: int = 0
    #: Changes of the epoch that this process asked for.
    epoch_changes: int = 0
    #: Writes that waited for leases to end, and how long.
    writes_held: int = 0
    hold_seconds: float = 0.0
    #: Heartbeats that PostgreSQL did not answer.
    heartbeats_missed: int = 0
    #: Sessions taken over from Redis.
    sessions_adopted: int = 0
    #: Entries compared with their row under its lock, and those that were trusted and different.
    cache_samples: int = 0
    cache_violations: int = 0
