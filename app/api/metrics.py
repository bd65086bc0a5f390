"""`GET /metrics`, for Prometheus."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Header, Response

from app.api.requests import Served
from app.errors import ChatError
from app.metrics import exposition
from app.store import StoreHealth
from app.wiring import Runtime

router = APIRouter()

#: A scrape waits ten seconds, as a rule. A store that hangs must not take the counters with it.
_ASK_SECONDS_MAX = 5.0


@router.get("/metrics", include_in_schema=False)
async def metrics(runtime: Served, accept: Annotated[str, Header()] = "") -> Response:
    """Never fails for an outage of a store: that is when it is read."""
    body, content_type = exposition(runtime, await _asked(runtime), accept=accept)
    return Response(body, headers={"Content-Type": content_type, "Cache-Control": "no-store"})


async def _asked(runtime: Runtime) -> tuple[StoreHealth, ...]:
    try:
        async with asyncio.timeout(_ASK_SECONDS_MAX):
            return await runtime.store.health()
    except (TimeoutError, ChatError):
        return ()
