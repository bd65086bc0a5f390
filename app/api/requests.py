"""What a request brings: its body, its user, its conditions, each checked once and refused by name."""

import hashlib
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, Generic, TypeVar
from urllib.parse import unquote_to_bytes
from uuid import UUID

from fastapi import Depends, Header, Query, Request
from fastapi.dependencies.models import Dependant
from pydantic import BaseModel, BeforeValidator, ValidationError
from starlette.requests import ClientDisconnect

from app import strict_json
from app.api.problems import RequestRefused, refused_field, refused_fields, validation_failed
from app.chat import from_milliseconds, milliseconds_of
from app.store import Cursor
from app.strict_json import NotStorable
from app.wiring import Runtime

_Model = TypeVar("_Model", bound=BaseModel)

KEY = re.compile(r"[\x21-\x7e]{1,255}")
# Milliseconds since 1970, which 14 digits count to the year 5138, and the id.
_CURSOR = re.compile(r"([0-9]{1,14})\.([0-9a-f]{32})")
_WHOLE = re.compile(r"-?\d+", re.ASCII)
TAG = re.compile(r'"(0|[1-9][0-9]{0,9})"')


def _described_as(pattern: re.Pattern[str]) -> dict[str, Any]:
    """A pattern for the description alone: the check is ours, and so is the `code` of its refusal."""
    return {"pattern": f"^{pattern.pattern}$"}


# Coroutines all of them, though none awaits: the framework would run plain functions in a thread each.
async def runtime_of(request: Request) -> Runtime:
    runtime: Runtime = request.app.state.runtime
    return runtime


Served = Annotated[Runtime, Depends(runtime_of)]


async def readable_query(request: Request) -> None:
    """Refuses what the framework would change in silence: bytes that are no UTF-8, a parameter given twice."""
    names: set[str] = set()
    for pair in request.scope["query_string"].split(b"&"):
        try:
            name, _, _ = unquote_to_bytes(pair.replace(b"+", b" ")).decode().partition("=")
        except UnicodeDecodeError as exc:
            raise refused_field("text_not_storable", "query", "holds bytes that are no UTF-8") from exc
        if pair and name in names:
            raise refused_field("duplicate_parameter", f"query.{name}", "is given twice")
        names.add(name)


async def known_query(request: Request) -> None:
    """Refuses a parameter that the call does not have. One that is misspelt would ask for other numbers in silence."""
    known = _query_names(request.scope["route"].dependant)
    for name in request.query_params:
        if name not in known:
            there_are = ", ".join(sorted(known)) or "none"
            raise refused_field(
                "unknown_parameter", f"query.{name}", f"is no parameter of this call (there are: {there_are})"
            )


def _query_names(dependant: Dependant) -> set[str]:
    return {field.alias for field in dependant.query_params}.union(*map(_query_names, dependant.dependencies))


def _storable_user(user_id: str | None, runtime: Runtime) -> str | None:
    if user_id is None:
        return None
    if flaw := strict_json.text_flaw(user_id):
        raise refused_field("text_not_storable", "query.user_id", flaw)
    longest = runtime.settings.user_id_characters_max
    if len(user_id) > longest:
        raise refused_field(
            "user_id_too_long", "query.user_id", f"has {len(user_id)} characters, at most {longest} are kept"
        )
    return user_id


async def owner(
    runtime: Served,
    user_id: Annotated[
        str,
        Query(min_length=1, max_length=256, description="whose sessions", examples=["user123"]),
    ],
) -> str:
    return _storable_user(user_id, runtime) or ""


async def caller(
    runtime: Served,
    user_id: Annotated[
        str | None,
        Query(
            min_length=1,
            max_length=256,
            description="where given, it must own the session: else 404",
            examples=["user123"],
        ),
    ] = None,
) -> str | None:
    return _storable_user(user_id, runtime)


async def only_user(
    runtime: Served,
    user_id: Annotated[
        str | None,
        Query(min_length=1, max_length=256, description="only this user's sessions", examples=["user123"]),
    ] = None,
) -> str | None:
    return _storable_user(user_id, runtime)


Owner = Annotated[str, Depends(owner)]
Caller = Annotated[str | None, Depends(caller)]
OnlyUser = Annotated[str | None, Depends(only_user)]


def _all_lines(request: Request, name: str) -> str:
    """A header's value; a header that came on several lines is the list of them."""
    return ", ".join(request.headers.getlist(name))


async def idempotency_key(
    request: Request,
    idempotency_key: Annotated[
        str | None,
        Header(
            description="1 to 255 visible ASCII characters, scoped to the session: a retry with the same key "
            "and body appends nothing and answers with the stored result",
            examples=["7f9c24e8"],
            json_schema_extra=_described_as(KEY),
        ),
    ] = None,
) -> str | None:
    if idempotency_key is not None and not KEY.fullmatch(_all_lines(request, "idempotency-key")):
        raise refused_field(
            "idempotency_key_malformed",
            "header.Idempotency-Key",
            "should be 1 to 255 visible ASCII characters",
        )
    return idempotency_key


async def if_match(
    request: Request,
    if_match: Annotated[
        str | None,
        Header(
            description='`"N"`: append only if the session\'s last message has seq N',
            examples=['"2"'],
            json_schema_extra=_described_as(TAG),
        ),
    ] = None,
) -> int | None:
    if if_match is None:
        return None
    if not (tag := TAG.fullmatch(_all_lines(request, "if-match").strip())):
        raise refused_field(
            "if_match_malformed", "header.If-Match", 'should be one strong tag with a seq, such as "2"'
        )
    return int(tag[1])


Key = Annotated[str | None, Depends(idempotency_key)]
IfMatch = Annotated[int | None, Depends(if_match)]


def _decimal(value: object) -> object:
    # pydantic would read 1.0, 1_000 and " 1 " as well.
    if isinstance(value, str) and not _WHOLE.fullmatch(value):
        raise ValueError("should be a whole number in decimal digits")
    return value


#: Stands after `Query` in an `Annotated`: bounds before it would vanish from the description.
WHOLE_NUMBER = BeforeValidator(_decimal)


async def seen_seqs(
    request: Request,
    _if_none_match: Annotated[
        str | None,
        Header(
            alias="If-None-Match",
            description='`"N"`, a list of such tags, or `*`: 304 where the session has not moved',
            examples=['"2"'],
        ),
    ] = None,
) -> tuple[set[int], bool]:
    """The seqs that `If-None-Match` names, by weak comparison, and whether it is `*`."""
    tags = _all_lines(request, "if-none-match")
    parts = [part.strip().removeprefix("W/") for part in tags.split(",")]
    return {int(tag[1]) for part in parts if (tag := TAG.fullmatch(part))}, "*" in parts


Seen = Annotated[tuple[set[int], bool], Depends(seen_seqs)]


@dataclass(frozen=True, slots=True)
class Body(Generic[_Model]):
    """A request's body as it was sent and as it was read."""

    model: _Model
    _sent: Any

    def digest(self, call: str) -> str:
        """Names the request: the same for the same call with the same JSON, however that was spelled."""
        canonical = json.dumps(self._sent, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
        return hashlib.blake2b(f"{call}\n{canonical}".encode(), digest_size=16).hexdigest()


def parsed_body(model: type[_Model], body: bytes) -> Body[_Model]:
    """The body as it was read. Raises `RequestRefused` that names each field that is wrong."""
    try:
        sent = strict_json.parse(body)
    except NotStorable as exc:
        flaws = [
            {
                "path": "body" if flaw.path is None else f"body.{flaw.path}",
                "code": flaw.code,
                "detail": flaw.detail,
            }
            for flaw in exc.flaws
        ]
        raise refused_fields(flaws[0]["code"], flaws) from exc
    try:
        return Body(model.model_validate(sent), sent)
    except ValidationError as exc:
        raise validation_failed(exc.errors(), within=["body"]) from exc


def json_body(model: type[_Model]) -> Callable[..., Awaitable[Body[_Model]]]:
    """A dependency that reads, parses and validates the body; `requestBody` of the route describes it."""

    async def read(request: Request, runtime: Served) -> Body[_Model]:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json" and not content_type.endswith("+json"):
            raise RequestRefused(
                "unsupported_media_type",
                f"header.Content-Type: is {content_type or 'missing'}, should be application/json",
                status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            )
        return parsed_body(model, await _read_bounded(request, runtime.settings.request_body_bytes_max))

    return read


async def _read_bounded(request: Request, bytes_max: int) -> bytes:
    """The body, or a refusal before more than the bound was read of it."""
    too_large = RequestRefused(
        "body_too_large",
        f"body: has more than {bytes_max} bytes (REQUEST_BODY_BYTES_MAX)",
        status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    )
    length = request.headers.get("content-length", "").lstrip("0")
    if length.isdecimal() and (len(length) > len(str(bytes_max)) or int(length) > bytes_max):
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > bytes_max:
                raise too_large
    except ClientDisconnect as exc:
        # Nobody reads the answer; it keeps a client that left from looking like a fault of ours.
        raise RequestRefused(
            "body_incomplete", "body: ended before its announced end", status=HTTPStatus.BAD_REQUEST
        ) from exc
    return bytes(body)


def request_body(model: type[BaseModel]) -> dict[str, Any]:
    """The `requestBody` of a route whose body is read by `json_body`, with its definitions in place."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def in_place(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return in_place(definitions[value["$ref"].rpartition("/")[2]])
            return {key: in_place(child) for key, child in value.items()}
        return [in_place(child) for child in value] if isinstance(value, list) else value

    return {"requestBody": {"required": True, "content": {"application/json": {"schema": in_place(schema)}}}}


def cursor_text(cursor: Cursor) -> str:
    return f"{milliseconds_of(cursor.created_at)}.{cursor.session_id.hex}"


async def cursor_of(
    after: Annotated[
        str | None,
        Query(
            description="the `next` of the page before",
            examples=["1763116200123.01998f2e5b7c7d3a9f102b6d4c8e1a55"],
            json_schema_extra=_described_as(_CURSOR),
        ),
    ] = None,
) -> Cursor | None:
    return place_of(after, "query.after")


def place_of(text: str | None, path: str) -> Cursor | None:
    """What `cursor_text` has written. Raises `RequestRefused` that names `path` for anything else."""
    if text is None:
        return None
    if not (place := _CURSOR.fullmatch(text)):
        raise refused_field("unknown_cursor", path, "is no cursor of ours: take it from `next` of a page")
    return Cursor(created_at=from_milliseconds(int(place[1])), session_id=UUID(place[2]))


After = Annotated[Cursor | None, Depends(cursor_of)]
