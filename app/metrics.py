"""What a process says of itself to Prometheus: what it has counted, and how it stands at this moment.

Nothing is registered anywhere: each answer is made from a `Runtime` and a registry that lasts as long. Every help
text says what to do, and `docs/operations.md` says the rest.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry

from app.store import StoreHealth
from app.wiring import Runtime, ServedMode, Stores


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


@dataclass(frozen=True, eq=False)
class _RuntimeCollector(Collector):
    runtime: Runtime
    stores: Sequence[StoreHealth]

    def collect(self) -> Iterable[Metric]:
        yield _labelled(
            "chat_mode",
            "Who owns the data: 1 for the mode of this moment. "
            "`draining` that does not end waits for Redis or for `chat-sessions adopt`.",
            "mode",
            {mode: float(mode == self.runtime.mode) for mode in get_args(ServedMode)},
        )
        yield _labelled(
            "chat_store_up",
            "Whether a store does all of its work, asked for this answer. "
            "0: GET /health/ready says what is the matter with it.",
            "store",
            {one.name: float(one.status == "pass") for one in self.stores},
        )
        if self.runtime.stores is not None:
            yield from _coherence(self.runtime.stores)


def _coherence(stores: Stores) -> Iterable[Metric]:
    for field, told in COUNTERS.items():
        yield CounterMetricFamily(told.name, told.text, value=getattr(stores.counts, field))
    yield GaugeMetricFamily(
        "chat_cache_trusted",
        "1 while this process may believe Redis. 0 for long: Redis is out or the cache is off; reads cost PostgreSQL. "
        "`chat-sessions doctor` says why.",
        value=float(stores.lease.current() is not None),
    )
    yield GaugeMetricFamily(
        "chat_lease_seconds_left",
        "How long the lease lasts unless it is renewed, which happens five times in its length. "
        "0: PostgreSQL has not answered for a second.",
        value=stores.lease.seconds_left(),
    )


def _labelled(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for one, value in values.items():
        family.add_metric([one], value)
    return family


def exposition(runtime: Runtime, stores: Sequence[StoreHealth], *, accept: str) -> tuple[bytes, str]:
    """The metrics in the format that is asked for, and its content type. `stores` as they are now."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_RuntimeCollector(runtime, stores))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type
