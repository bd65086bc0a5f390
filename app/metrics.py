"""What a process says of itself to Prometheus: what it has counted, and how it stands at this moment.

Nothing is registered anywhere: each answer is made from what was observed and a registry that lasts as long. Every
help text says what to do, and `docs/operations.md` says the rest.

Of several workers behind one port a scrape reaches one. That one tells of all, each series labelled with its worker:
a sum would fall when a worker is replaced, which looks like a counter that has begun anew.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry

from app.analytics.rollups import MARKS_TOLD_MAX
from app.store import StoreHealth
from app.wiring import Runtime, ServedMode


@dataclass(frozen=True, slots=True)
class Told:
    """How a count is told: the metric's name without its `_total`, and what to do about it."""

    name: str
    text: str


#: By the field of `Counts`.
COUNTERS: Mapping[str, Told] = {
    "cache_hits": Told(
        "chat_cache_hits",
        "Reads that Redis alone answered, under the lease. "
        "If it stands still under load, look at chat_cache_trusted and CACHE_VERIFY.",
    ),
    "cache_fills": Told(
        "chat_cache_fills",
        "Entries written anew from PostgreSQL: misses. If it grows as fast as reads, "
        "Redis evicts (raise maxmemory) or SESSION_TTL_SECONDS is too short.",
    ),
    "cache_validations": Told(
        "chat_cache_validations",
        "Entries found dirty or of an older epoch, and equal to their row: trusted again. "
        "A burst after a change of the epoch is the protocol at work; nothing to do.",
    ),
    "lease_expired_reads": Told(
        "chat_lease_expired_reads",
        "Reads that went to PostgreSQL because the lease had ended when Redis answered. "
        "If it grows steadily, the event loop or Redis stalls: look at CPU, SLOWLOG, big entries.",
    ),
    "unverified_reads": Told(
        "chat_unverified_reads",
        "Answers labelled X-Cache-Freshness: unverified, given while PostgreSQL was out. Bring PostgreSQL back.",
    ),
    "epoch_changes": Told(
        "chat_cache_epoch_changes",
        "Epochs that this process changed: Redis was lost, replaced, or came back. "
        "Several an hour: Redis or its network flaps; look at Redis' log and uptime.",
    ),
    "writes_held": Told(
        "chat_writes_held",
        "Writes that waited for leases on an older epoch to end. "
        "Expected for about a second after Redis was lost; else see chat_cache_epoch_changes_total.",
    ),
    "hold_seconds": Told(
        "chat_hold_seconds",
        "For how long writes were held, together. See chat_writes_held_total.",
    ),
    "heartbeats_missed": Told(
        "chat_heartbeats_missed",
        "Heartbeats that PostgreSQL did not answer; five in a row end the lease. "
        "Look at PostgreSQL, its network, and max_connections.",
    ),
    "sessions_adopted": Told(
        "chat_sessions_adopted",
        "Sessions taken over from Redis into PostgreSQL. Expected after the mode was changed to hybrid.",
    ),
    "cache_samples": Told(
        "chat_cache_samples",
        "Entries compared with their row under its lock, about one a second. "
        "If it stands still, nothing watches over cache_violations_total.",
    ),
    # The one that stands for the guarantee, under the name that people look for.
    "cache_violations": Told(
        "cache_violations",
        "Trusted entries that were not what PostgreSQL has: must be 0. Set CACHE_VERIFY=always and restart, "
        "run `chat-sessions verify`, keep the log, and report it.",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """A process at this moment, in values that can travel to another one. No `counts`: there is no database."""

    mode: str
    counts: Mapping[str, float]
    trusted: bool = False
    lease_seconds_left: float = 0.0
    rollup_lag_seconds: float = 0.0
    rollup_dirty: int = 0
    rollup_set_aside: int = 0


def observed(runtime: Runtime) -> Observed:
    stores = runtime.stores
    if stores is None:
        return Observed(mode=runtime.mode, counts={})
    pending = runtime.rollups.pending if runtime.rollups is not None else None
    return Observed(
        mode=runtime.mode,
        counts={field: getattr(stores.counts, field) for field in COUNTERS},
        trusted=stores.lease.current() is not None,
        lease_seconds_left=stores.lease.seconds_left(),
        rollup_lag_seconds=pending.lag_seconds if pending is not None else 0.0,
        rollup_dirty=pending.marks if pending is not None else 0,
        rollup_set_aside=pending.set_aside if pending is not None else 0,
    )


def exposition(
    processes: Mapping[str, Observed | None], stores: Sequence[StoreHealth], *, accept: str
) -> tuple[bytes, str]:
    """The metrics in the format that is asked for, and its content type. `stores` as they are now.

    `processes` by the worker's number; None: it did not answer. The only process of a service is named "".
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_ObservedCollector(processes, stores))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


@dataclass(frozen=True, eq=False)
class _ObservedCollector(Collector):
    processes: Mapping[str, Observed | None]
    stores: Sequence[StoreHealth]

    def collect(self) -> Iterable[Metric]:
        answered = [(_worker(name), one) for name, one in self.processes.items() if one is not None]
        yield _gauge(
            "chat_mode",
            "Who owns the data: 1 for the mode of this moment. "
            "`draining` that does not end waits for Redis or for `chat-sessions adopt`.",
            (
                ({"mode": mode, **worker}, float(mode == one.mode))
                for worker, one in answered
                for mode in get_args(ServedMode)
            ),
        )
        yield _gauge(
            "chat_store_up",
            "Whether a store does all of its work, asked for this answer. "
            "0: GET /health/ready says what is the matter with it.",
            (({"store": one.name}, float(one.status == "pass")) for one in self.stores),
        )
        if "" not in self.processes:
            yield _gauge(
                "chat_worker_up",
                "Whether a worker has answered within a second. "
                "0 for long: it hangs, or ends again and again; the log says which.",
                ((_worker(name), float(one is not None)) for name, one in self.processes.items()),
            )
        coherent = [(worker, one) for worker, one in answered if one.counts]
        if coherent:
            yield from _coherence(coherent)


def _coherence(processes: Sequence[tuple[dict[str, str], Observed]]) -> Iterable[Metric]:
    for field, told in COUNTERS.items():
        counter = CounterMetricFamily(told.name, told.text, labels=list(processes[0][0]))
        for worker, one in processes:
            counter.add_metric(list(worker.values()), one.counts[field])
        yield counter
    yield _gauge(
        "chat_cache_trusted",
        "1 while this process may believe Redis. 0 for long: Redis is out or the cache is off; reads cost PostgreSQL. "
        "`chat-sessions doctor` says why.",
        ((worker, float(one.trusted)) for worker, one in processes),
    )
    yield _gauge(
        "chat_lease_seconds_left",
        "How long the lease lasts unless it is renewed, which happens five times in its length. "
        "0: PostgreSQL has not answered for a second.",
        ((worker, one.lease_seconds_left) for worker, one in processes),
    )
    yield _gauge(
        "chat_rollup_lag_seconds",
        "How old the oldest write is that reports do not have yet, as this process saw it last. "
        "More than 5 for long: look at the log, and at `chat-sessions rollup`.",
        ((worker, one.rollup_lag_seconds) for worker, one in processes),
    )
    yield _gauge(
        "chat_rollup_dirty_sessions",
        f"Marks of writes that reports do not have yet, up to {MARKS_TOLD_MAX}. "
        "It falls after an import; if it only grows, see chat_rollup_lag_seconds.",
        ((worker, float(one.rollup_dirty)) for worker, one in processes),
    )
    yield _gauge(
        "chat_rollup_set_aside_sessions",
        "Sessions that can't be counted, so that they are in no report: must be 0. "
        "`chat-sessions rollup status` says why.",
        ((worker, float(one.rollup_set_aside)) for worker, one in processes),
    )


def _worker(name: str) -> dict[str, str]:
    return {"worker": name} if name else {}


def _gauge(name: str, text: str, samples: Iterable[tuple[dict[str, str], float]]) -> Metric:
    family = Metric(name, text, "gauge")
    for labels, value in samples:
        family.add_sample(name, labels, value)
    return family
