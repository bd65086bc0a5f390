"""Style sheet and scripts, from memory: each at an address that holds its content's hash, so it may be kept for ever."""

import gzip
import hashlib
import mimetypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Route

_FOLDER = Path(__file__).with_name("static")

_HEADERS = {
    "Cache-Control": "public, max-age=31536000, immutable",
    "Vary": "Accept-Encoding",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """A file as it is sent, plain and packed."""

    address: str
    media_type: str
    plain: bytes
    packed: bytes


@cache
def assets() -> Mapping[str, Asset]:
    """All of them, by their path below `static`."""
    return {
        path.relative_to(_FOLDER).as_posix(): _asset(path)
        for path in sorted(_FOLDER.rglob("*"))
        if path.suffix in {".css", ".js", ".svg"}
    }


def _asset(path: Path) -> Asset:
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:12]
    return Asset(
        address=f"/assets/{digest}/{path.relative_to(_FOLDER).as_posix()}",
        media_type=mimetypes.guess_type(path.name)[0] or "application/octet-stream",
        plain=content,
        # Without the time of the packing: the same file is the same bytes in every worker.
        packed=gzip.compress(content, 9, mtime=0),
    )


def address(name: str) -> str:
    """Where a browser finds the file. Raises KeyError for one that there is not."""
    return assets()[name].address


def takes_gzip(request: Request) -> bool:
    return "gzip" in request.headers.get("accept-encoding", "")


async def asset(request: Request) -> Response:
    """404 for the hash of another version: whoever asks for that would keep this content for it."""
    found = assets().get(request.path_params["name"])
    if found is None or found.address != request.url.path:
        raise HTTPException(404)
    if takes_gzip(request):
        return Response(
            found.packed, media_type=found.media_type, headers={**_HEADERS, "Content-Encoding": "gzip"}
        )
    return Response(found.plain, media_type=found.media_type, headers=_HEADERS)


routes = [Route("/assets/{digest}/{name:path}", asset, methods=["GET"])]
