"""Whether the process lives, and whether it can serve."""

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from app import __version__
from app.api.requests import Served
from app.api.schemas import LiveOut, ReadyOut

router = APIRouter(prefix="/health", tags=["health"])

_WORST = ("pass", "warn", "fail")


@router.get("/live", response_model=LiveOut, summary="The process answers; asks no store")
async def live() -> Response:
    """For a supervisor that restarts what does not answer."""
    return JSONResponse({"status": "pass", "version": __version__})


@router.get(
    "/ready",
    response_model=ReadyOut,
    summary="Each store with its state; 503 when requests can't be served as promised",
    responses={503: {"model": ReadyOut, "description": "not ready"}},
)
async def ready(runtime: Served) -> Response:
    """For a load balancer: `warn` still serves, and says what does not."""
    stores = await runtime.health()
    status = max((one.status for one in stores), key=_WORST.index)
    answer: dict[str, Any] = {
        "status": status,
        "mode": runtime.mode,
        "embedded": runtime.embedded,
        "version": __version__,
        "stores": {one.name: {"status": one.status, "state": one.state} for one in stores},
    }
    return JSONResponse(answer, status_code=503 if status == "fail" else 200)
