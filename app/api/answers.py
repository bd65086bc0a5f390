"""What every answer about a session says in its headers, and the history's body."""

from collections.abc import Mapping
from http import HTTPStatus

from starlette.responses import Response

from app.store import CURRENT, Freshness, History


def truth(*, seq: int | None = None, source: str, freshness: Freshness = CURRENT) -> dict[str, str]:
    """`X-Session-Seq`, `X-Session-Source`, and the label of an answer that could not be verified."""
    headers = {"X-Session-Source": source}
    if seq is not None:
        headers["X-Session-Seq"] = str(seq)
    if freshness.age_seconds is not None:
        headers["X-Cache-Freshness"] = f"unverified; age={freshness.age_seconds:.3f}"
    return headers


def history_headers(history: History) -> Mapping[str, str]:
    seq = history.session.message_count
    headers = truth(seq=seq, source=history.source, freshness=history.freshness)
    if history.freshness.age_seconds is None:
        # A tag says that the answer is known: an unverified one has none.
        headers["ETag"] = f'"{seq}"'
    return headers


class JsonBytes(Response):
    """An answer of the hot calls: JSON that is bytes already, and headers that are known not to say what it is."""

    def __init__(self, body: bytes, headers: Mapping[str, str]) -> None:
        # Starlette's own looks at each header several times, which takes as long as the rest of the answer.
        self.status_code = HTTPStatus.OK
        self.body = body
        self.background = None
        self.raw_headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            *((name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()),
        ]


def history_body(history: History) -> bytes:
    """The answer, its messages as the stores keep them: no line is taken apart on the way."""
    session, before = history.session, history.next_before_seq
    return b"".join(
        (
            f'{{"session_id":"{session.session_id}","messages":['.encode(),
            history.body,
            f'],"total_messages":{session.message_count}'.encode(),
            f',"first_available_seq":{session.first_available_seq}'.encode(),
            f',"next_before_seq":{before}}}'.encode() if before is not None else b"}",
        )
    )
