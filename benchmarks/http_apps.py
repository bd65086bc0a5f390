"""What our HTTP calls are compared with, each served by uvicorn with the settings of `chat-sessions serve`.

`fastapi`: a route that answers the bytes of a file, and one that parses what ours parses and stores nothing.
`raw`: the file's bytes by ASGI alone, to show what uvicorn and the load generator can do at all.

    python benchmarks/http_apps.py fastapi|raw PORT FILE
"""

import asyncio
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import uvicorn
import uvloop
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.types import ASGIApp, Receive, Scope, Send


class Record(BaseModel):
    role: Literal["user", "assistant", "system", "tool"]
    content: str
    timestamp: datetime | None = None
    metadata: dict[str, Any] = {}


class Records(BaseModel):
    messages: list[Record]


def fastapi_app(answer: bytes) -> ASGIApp:
    app = FastAPI()

    @app.get("/constant")
    async def constant() -> Response:
        return Response(answer, media_type="application/json")

    @app.post("/sessions/{session_id}/history")
    async def parsed(session_id: UUID, body: Records) -> Response:
        return JSONResponse({"session_id": str(session_id), "first_seq": 1, "last_seq": len(body.messages)})

    return app


def raw_app(answer: bytes) -> ASGIApp:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    return app


def main() -> None:
    kind, port, file = sys.argv[1:]
    answer = Path(file).read_bytes()
    app = {"fastapi": fastapi_app, "raw": raw_app}[kind](answer)
    config = uvicorn.Config(app, port=int(port), log_config=None, access_log=False, lifespan="off")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(uvicorn.Server(config).serve())


if __name__ == "__main__":
    main()
