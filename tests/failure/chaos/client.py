"""HTTP/1.1 as a client of a chat service speaks it: kept-alive connections, one request at a time on each."""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tests.failure.chaos.proxy import LOOPBACK


class NoAnswer(Exception):
    """Refused, broken off, or too slow: nobody knows what became of the request."""


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def labelled(self) -> bool:
        return "x-cache-freshness" in self.headers


_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Caller:
    """One client's connections, one to each instance."""

    def __init__(self, ports: Sequence[int], *, patience_seconds: float) -> None:
        self._ports = ports
        self._patience_seconds = patience_seconds
        self._open: dict[int, _Connection] = {}

    async def ask(
        self,
        instance: int,
        method: str,
        path: str,
        body: object = None,
        *,
        headers: Mapping[str, str] | None = None,
        leave_after_seconds: float | None = None,
    ) -> Reply:
        """One request and its answer. With `leave_after_seconds` the client goes away in the middle."""
        request = _request(method, path, body, headers or {})
        reused = instance in self._open
        began = time.monotonic()
        try:
            async with asyncio.timeout(
                self._patience_seconds if leave_after_seconds is None else leave_after_seconds
            ):
                return await self._exchange(instance, request)
        except (OSError, EOFError, TimeoutError) as exc:
            self._drop(instance)
            # An idle connection may end just when it is used again; every HTTP client then asks anew.
            if reused and method == "GET" and isinstance(exc, (ConnectionError, EOFError)):
                return await self.ask(instance, method, path, body, headers=headers)
            seconds = time.monotonic() - began
            raise NoAnswer(f"{type(exc).__name__} after {seconds:.3f} s") from exc
        except BaseException:
            self._drop(instance)
            raise

    async def _exchange(self, instance: int, request: bytes) -> Reply:
        if instance not in self._open:
            self._open[instance] = await asyncio.open_connection(LOOPBACK, self._ports[instance], limit=2**20)
        reader, writer = self._open[instance]
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {}
        for line in lines[1:-2]:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if headers.get("connection") == "close":
            self._drop(instance)
        return Reply(int(lines[0][9:12]), headers, body)

    def _drop(self, instance: int) -> None:
        if (connection := self._open.pop(instance, None)) is not None:
            with suppress(OSError):
                connection[1].transport.abort()

    def close(self) -> None:
        for instance in list(self._open):
            self._drop(instance)


def _request(method: str, path: str, body: object, headers: Mapping[str, str]) -> bytes:
    payload = b"" if body is None else json.dumps(body, ensure_ascii=False).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: chaos", *(f"{name}: {headers[name]}" for name in headers)]
    if payload:
        lines.append("Content-Type: application/json")
    lines += [f"Content-Length: {len(payload)}", "", ""]
    return "\r\n".join(lines).encode() + payload
