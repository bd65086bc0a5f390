"""The application: the API and the pages, errors, documentation, and the lifespan that opens and closes everything."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from app import __version__
from app.api import health, hot, metrics, problems, reports, search, sessions
from app.settings import Settings
from app.web import PAGES
from app.web.frame import show_errors
from app.wiring import open_runtime

_DESCRIPTION = """
Chat sessions that survive: every message is in PostgreSQL before it is acknowledged, and in Redis for the
next read. Errors are problem documents (RFC 9457) with a stable `code`.

`X-Session-Seq` is the seq of the session's last message, `X-Session-Source` the store that answered.
"""


_PROBLEM = {"$ref": "#/components/schemas/Problem"}


def create_app(settings: Settings, *, embedded: bool = False) -> FastAPI:
    """The application for settings whose URLs are set. `embedded` is only reported."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_runtime(settings, embedded=embedded) as runtime:
            app.state.runtime = runtime
            app.state.searches = asyncio.Semaphore(search.SEARCHES_AT_ONCE)
            app.state.reports = asyncio.Semaphore(reports.REPORTS_AT_ONCE)
            yield

    app = hot.HotFirst(
        title="Chat sessions",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        # The framework would look in the environment, for every request, whether somebody has set up OpenTelemetry:
        # a twentieth of a cached history. `/metrics` tells what happens here.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    # The search before the reports, which take every other name.
    routers = (sessions.router, search.router, reports.router, health.router, metrics.router)
    pages = PAGES if settings.enable_pages else []
    problems.install(app, [*pages, *(route for router in routers for route in router.routes)])
    for router in routers:
        app.include_router(router)
    if pages:
        # Before the calls: to have asked each of those would take longer than some pages' queries.
        app.router.routes[:0] = pages
        show_errors(app)
    # From this service itself: a browser asks no other host for anything.
    app.mount(
        "/docs/assets", StaticFiles(directory=Path(__file__).parent / "api" / "swagger_ui"), name="swagger"
    )

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="Chat sessions: API",
            swagger_js_url="/docs/assets/swagger-ui-bundle.js",
            swagger_css_url="/docs/assets/swagger-ui.css",
            swagger_favicon_url="data:,",
            # Else a page that is not on localhost sends the description to a host of Swagger's.
            swagger_ui_parameters={"validatorUrl": None},
        )

    app.openapi = lambda: _described(app)  # type: ignore[method-assign]  # the documented way
    return app


def _described(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description; FastAPI would call every error `application/json`."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        for calls in schema["paths"].values():
            for call in calls.values():
                for parameter in call.get("parameters", []):
                    parameter["schema"] = _not_null(parameter["schema"])
                for answer in call["responses"].values():
                    content = answer.get("content", {})
                    if content.get("application/json", {}).get("schema") == _PROBLEM:
                        content["application/problem+json"] = content.pop("application/json")
        app.openapi_schema = schema
    return app.openapi_schema


def _not_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A parameter's schema without null: one that is optional is left out, `null` would be four letters."""
    kinds = [kind for kind in schema.get("anyOf", []) if kind != {"type": "null"}]
    return (
        {**{key: value for key, value in schema.items() if key != "anyOf"}, **kinds[0]} if kinds else schema
    )
