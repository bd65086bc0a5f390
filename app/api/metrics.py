"""`GET /metrics`, for Prometheus."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Header, Request, Response

from app.api.requests import Served
from app.errors import ChatError
from app.metrics import Observed, exposition, observed
from app.store import StoreHealth
from app.wiring import Runtime

router = APIRouter()

#: A scrape waits ten seconds, as a rule. A store that hangs must not take the counters with it.
_ASK_SECONDS_MAX = 5.0

#: What all workers of the service say of themselves, as `own_metrics`, by number; None: no answer.
AskWorkers = Callable[[], Awaitable[Mapping[str, Mapping[str, Any] | None]]]


def own_metrics(app: FastAPI) -> dict[str, Any]:
    """What this process tells the others, as JSON."""
    return asdict(observed(app.state.runtime))


def share_metrics(app: FastAPI, ask_workers: AskWorkers) -> None:
    """This process is one of several: it tells of all of them."""
    app.state.ask_workers = ask_workers


@router.get("/metrics", include_in_schema=False)
async def metrics(request: Request, runtime: Served, accept: Annotated[str, Header()] = "") -> Response:
    """Never fails for an outage of a store: that is when it is read."""
    processes = await of_all_workers(request, runtime)
    body, content_type = exposition(processes, await _asked(runtime), accept=accept)
    return Response(body, headers={"Content-Type": content_type, "Cache-Control": "no-store"})


async def of_all_workers(request: Request, runtime: Runtime) -> Mapping[str, Observed | None]:
    """What each process of this service says of itself, by the worker's number; None: it did not answer.

    The only process of a service is named "".
    """
    ask_workers: AskWorkers | None = getattr(request.app.state, "ask_workers", None)
    if ask_workers is None:
        return {"": observed(runtime)}
    workers = await ask_workers()
    return {name: Observed(**told) if told else None for name, told in workers.items()}


async def _asked(runtime: Runtime) -> tuple[StoreHealth, ...]:
    try:
        async with asyncio.timeout(_ASK_SECONDS_MAX):
            return await runtime.store.health()
    except (TimeoutError, ChatError):
        return ()
