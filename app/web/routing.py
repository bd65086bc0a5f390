"""How an address comes to its page: what it asks is checked as the API's calls check theirs, and refused in the same words.

Not by the framework's dependencies: those took longer than a list's query.
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.routing import Route

from app.api.problems import validation_failed
from app.api.requests import readable_query
from app.web.languages import known_language
from app.wiring import Runtime


class Asked(BaseModel):
    """What an address asks: each field a part of its path, or a parameter. Parameters that no field names are passed over."""

    model_config = ConfigDict(frozen=True)


_Asked = TypeVar("_Asked", bound=Asked)
Page = Callable[[Request, Runtime, _Asked], Awaitable[Response]]


class Pages:
    """A module's pages. They are no part of the API's description."""

    def __init__(self) -> None:
        self.routes: list[Route] = []

    def get(self, path: str, asked: type[_Asked]) -> Callable[[Page[_Asked]], Page[_Asked]]:
        return self._at(path, asked, "GET")

    def post(self, path: str, asked: type[_Asked]) -> Callable[[Page[_Asked]], Page[_Asked]]:
        return self._at(path, asked, "POST")

    def _at(self, path: str, asked: type[_Asked], method: str) -> Callable[[Page[_Asked]], Page[_Asked]]:
        def add(page: Page[_Asked]) -> Page[_Asked]:
            async def answer(request: Request) -> Response:
                await readable_query(request)
                await known_language(request)
                return await page(request, request.app.state.runtime, _read(asked, request))

            self.routes.append(Route(path, answer, methods=[method]))
            return page

        return add


def _read(asked: type[_Asked], request: Request) -> _Asked:
    try:
        return asked.model_validate({**request.query_params, **request.path_params})
    except ValidationError as exc:
        found = [
            error | {"loc": ("path" if error["loc"][0] in request.path_params else "query", *error["loc"])}
            for error in exc.errors()
        ]
        raise validation_failed(found) from exc
