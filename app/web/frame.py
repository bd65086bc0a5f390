"""The frame that all pages are in: templates, headers, and what a person sees where a page can't be shown."""

import gzip
import json
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlencode

from fastapi import FastAPI, Request
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import Response

from app.chat import format_time
from app.web.assets import address, takes_gzip
from app.web.languages import COOKIE, LANGUAGES, Language, language_of
from app.web.pieces import Pieces, moment_text

#: Where the header leads to: `place.<name>` is the text.
PLACES = {"chat": "/", "sessions": "/sessions", "analytics": "/analytics", "stores": "/stores"}

_LANGUAGE_SECONDS = 365 * 86400

#: Smaller than a packet: packing it gains nothing.
_PACKED_FROM_BYTES = 1200

#: The last level that does not look for better matches: a page is packed in half of the time, and is 10 % larger.
_PACKING = 3

_SECURITY = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "object-src 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    # No other host learns which session somebody looked at.
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    # Transcripts are nobody's to keep; and what stores say is old a second later.
    "Cache-Control": "no-store",
    "Vary": "Accept, Accept-Encoding, Accept-Language, Cookie",
}

#: Those who call them are programs: their errors are problem documents, whatever they accept.
_NEVER_PAGES = ("/api/", "/assets/", "/health/", "/metrics", "/openapi.json")


def _environment(language: Language) -> Environment:
    """The templates in one language: compiled, what stands in quotes is its text already, and costs a page nothing."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters |= {
        "asset": address,
        "duration": language.duration,
        "moment": moment,
        "number": language.number,
        "percent": language.percent,
        "short": language.short,
        "size": language.size,
        "t": language.text,
    }
    return environment


def render(
    request: Request,
    template: str,
    *,
    status: int = 200,
    headers: dict[str, str] | None = None,
    **values: Any,
) -> Response:
    """A page, or a fragment of one, in the language of the request. All values are text: none is taken for markup.

    Templates have the filters of `_environment`, and what `base.html` takes.
    """
    language = language_of(request)
    body = (
        _ENVIRONMENTS[language.code]
        .get_template(template)
        .render(
            here=request.url.path,
            language=language.code,
            languages=[(code, name, _in_language(request, code)) for code, name in LANGUAGES.items()],
            pieces=_PIECES[language.code],
            places=PLACES.items(),
            **values,
        )
        .encode()
    )
    response = Response(
        body, status_code=status, media_type="text/html", headers={**_SECURITY, **(headers or {})}
    )
    if takes_gzip(request) and len(body) >= _PACKED_FROM_BYTES:
        response.body = gzip.compress(body, _PACKING)
        response.headers["Content-Length"] = str(len(response.body))
        response.headers["Content-Encoding"] = "gzip"
    if request.query_params.get(COOKIE) == language.code:
        response.set_cookie(COOKIE, language.code, max_age=_LANGUAGE_SECONDS, httponly=True, samesite="lax")
    return response


def _in_language(request: Request, code: str) -> str:
    """The same page, its state with it, in another language."""
    state = [(name, value) for name, value in request.query_params.multi_items() if name != COOKIE]
    return f"{request.url.path}?{urlencode([*state, (COOKIE, code)])}"


def moment(when: datetime, shown: Literal["moment", "time"] = "moment") -> Markup:
    """A time: a script shows it in the reader's zone. `shown`: the whole `moment`, or its `time` of day."""
    told = format_time(when)
    text = moment_text(told)
    # Markup's own formatting escapes again what is digits.
    return Markup(  # noqa: S704
        f'<time datetime="{told}" data-local="{shown}">{text if shown == "moment" else text[11:]}</time>'
    )


_ENVIRONMENTS = {code: _environment(Language(code)) for code in LANGUAGES}
_PIECES = {
    code: Pieces(environment.get_template("pieces.html").module, Language(code))
    for code, environment in _ENVIRONMENTS.items()
}


def show_errors(app: FastAPI) -> None:
    """What the application answers to an error becomes a page where somebody looks at it: the same status and words."""
    for kind, as_problem in list(app.exception_handlers.items()):
        app.add_exception_handler(kind, _shown(as_problem))


def _shown(as_problem: Callable[..., Any]) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def handle(request: Request, exc: Exception) -> Response:
        answer: Response = await as_problem(request, exc)
        return _error_page(request, answer) if _looks(request) else answer

    return handle


def _looks(request: Request) -> bool:
    """Whether a person asks: a browser that goes to an address names HTML first."""
    return "text/html" in request.headers.get("accept", "") and not request.url.path.startswith(_NEVER_PAGES)


def _error_page(request: Request, answer: Response) -> Response:
    problem = json.loads(bytes(answer.body))
    language = language_of(request)
    return render(
        request,
        "error.html",
        status=answer.status_code,
        headers={name: answer.headers[name] for name in ("allow", "retry-after") if name in answer.headers},
        problem=problem,
        **_told(language, answer.status_code),
    )


def _told(language: Language, status: int) -> dict[str, str]:
    """What the status means to a reader, and what to do."""
    known = status if status in {404, 503} else ("refused" if status < 500 else 500)  # noqa: PLR2004 - of RFC 9110
    return {"title": language.text(f"error.{known}"), "advice": language.text(f"error.{known}.advice")}
