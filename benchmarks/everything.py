"""All scenarios, with every peer, limits, latencies and memory: the report under docs/benchmarks/.

python benchmarks/everything.py [--report DIR] [--json FILE] [--latency-seconds N] [--memory-minutes N] [--long]
"""

from pathlib import Path

import lease
import limits
import over_http
import peers
from harness import Pace
from quick import arguments, in_process, run
from report import Results

from app.embedded import EmbeddedServers

_LONG_SECONDS = 300
_LONG_MINUTES = 10


def main() -> None:
    pace = Pace(seconds=1, rounds=10, calls=50)
    parser = arguments((__doc__ or "").splitlines()[0], pace)
    parser.add_argument("--latency-seconds", type=float, default=15, help="of each open loop")
    parser.add_argument("--memory-minutes", type=float, default=2, help="of full load")
    parser.add_argument(
        "--long", action="store_true", help="5 minutes of each open loop, 10 of full load: what is published"
    )
    parser.set_defaults(report=Path("docs/benchmarks"))
    wanted = parser.parse_args()
    latency_seconds = _LONG_SECONDS if wanted.long else wanted.latency_seconds
    memory_minutes = _LONG_MINUTES if wanted.long else wanted.memory_minutes

    async def measure(results: Results, servers: EmbeddedServers, folder: Path, pace: Pace) -> None:
        results.notes += [f"left out: {name}: {why}" for name, why in peers.NOT_HERE.items()]
        await in_process(results, servers, folder, pace, peers.ALL)
        for scenario in await lease.scenarios(servers, pace):
            results.add(scenario)
        results.add(await limits.bulk_copy(servers, pace))
        results.notes += await limits.redis_limits(servers)
        async with over_http.opened(servers, folder) as over:
            results.add(await over_http.http_reads(over, pace))
            results.add(await over_http.http_appends(over, pace))
            results.latencies += await over_http.latencies(over, latency_seconds)
            for latency in results.latencies:
                results.measures += latency.measures()
            results.memory = await over_http.memory(over, memory_minutes)
            results.measures += results.memory.measures()

    pace = Pace(seconds=wanted.seconds, rounds=wanted.rounds, calls=pace.calls)
    run(measure, pace, report=wanted.report, json=wanted.json, command="make bench")


if __name__ == "__main__":
    main()
