"""What is sent and answered. The only pydantic models besides the settings."""

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictStr

from app.analytics.reports import Granularity
from app.chat import ChatSession, Role, format_time, is_plausible
from app.store import SessionPage

_ID = "01998f2e-5b7c-7d3a-9f10-2b6d4c8e1a55"
_TIME = "2025-11-14T10:30:00.123Z"


def _plausible(moment: datetime) -> datetime:
    try:
        utc = moment.astimezone(UTC)
    except OverflowError as exc:
        raise ValueError("is beyond the calendar") from exc
    if not is_plausible(utc):
        raise ValueError("should lie between the year 2000 and a day ahead")
    return utc


RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)


def _rfc3339(value: object) -> object:
    # pydantic would take a number for seconds since 1970, or a date for its midnight.
    if not isinstance(value, str) or not RFC3339.fullmatch(value):
        raise ValueError("should be RFC 3339, such as 2025-11-14T10:30:00.123Z")
    return value


Timestamp = Annotated[datetime, BeforeValidator(_rfc3339), AfterValidator(_plausible)]
Metadata = Annotated[
    dict[str, Any],
    Field(description="any JSON object; kept as it was sent", examples=[{"source": "web"}]),
]


class _Sent(BaseModel):
    model_config = ConfigDict(frozen=True)


class MessageIn(_Sent):
    """A user's message that the assistant is asked to answer."""

    message: StrictStr = Field(
        description="the user's words: at least one character that is not white space",
        examples=["Điều kiện tham gia đấu thầu?"],
        min_length=1,
        json_schema_extra={"pattern": r"\S"},
    )
    metadata: Metadata | None = None


class RecordIn(_Sent):
    """A message that was produced elsewhere."""

    role: Role = Field(examples=["assistant"])
    content: StrictStr = Field(description="may be empty", examples=["Theo Luật Đấu thầu 2023..."])
    timestamp: Timestamp | None = Field(
        None,
        description="when it was said: RFC 3339 with any offset, from the year 2000 to a day ahead; "
        "default: now",
        examples=["2025-11-14T17:30:00+07:00"],
    )
    metadata: Metadata | None = None


class RecordsIn(_Sent):
    """Messages to append, all or none."""

    messages: list[RecordIn] = Field(min_length=1)


class CreatedOut(BaseModel):
    session_id: str = Field(examples=[_ID])
    created_at: str = Field(examples=[_TIME])

    @classmethod
    def of(cls, session: ChatSession) -> Self:
        return cls(session_id=str(session.session_id), created_at=format_time(session.created_at))


class ListedOut(CreatedOut):
    user_id: str = Field(examples=["user123"])
    last_activity: str = Field(examples=[_TIME])
    total_messages: int = Field(description="the seq of its last message", examples=[2])


class SessionOut(ListedOut):
    first_available_seq: int = Field(
        description="where its readable history begins: beyond 1 only in Redis-only mode", examples=[1]
    )

    @classmethod
    def of(cls, session: ChatSession) -> Self:
        return cls(
            session_id=str(session.session_id),
            created_at=format_time(session.created_at),
            user_id=session.user_id,
            last_activity=format_time(session.last_activity),
            total_messages=session.message_count,
            first_available_seq=session.first_available_seq,
        )


class AnswerOut(BaseModel):
    session_id: str = Field(examples=[_ID])
    user_message: str = Field(examples=["Điều kiện tham gia đấu thầu?"])
    assistant_response: str = Field(examples=["Theo Luật Đấu thầu 2023..."])
    sources: list[str] = Field(examples=[["doc1", "doc2"]])
    processing_time_ms: int = Field(description="how long the assistant thought", examples=[3500])


class AppendedOut(BaseModel):
    session_id: str = Field(examples=[_ID])
    first_seq: int = Field(examples=[3])
    last_seq: int = Field(examples=[4])


class MessageOut(BaseModel):
    role: Role
    content: str = Field(examples=["Điều kiện tham gia đấu thầu?"])
    timestamp: str = Field(examples=[_TIME])
    metadata: dict[str, Any] = Field(examples=[{"source": "web"}])
    seq: int = Field(description="its place in the session, from 1", examples=[1])
    message_id: str = Field(examples=[_ID])


class HistoryOut(BaseModel):
    session_id: str = Field(examples=[_ID])
    messages: list[MessageOut] = Field(description="oldest first")
    total_messages: int = Field(description="all messages of the session", examples=[2])
    first_available_seq: int = Field(description="where the readable history begins", examples=[1])
    next_before_seq: int | None = Field(
        None, description="`before_seq` of the page before this one; absent at the start", examples=[101]
    )


class SessionsOut(BaseModel):
    sessions: list[ListedOut] = Field(description="newest first")
    total: int = Field(description="all that match, on every page", examples=[2])
    next: str | None = Field(
        None,
        description="`after` of the next page; absent at the end",
        examples=["1763116200123.01998f2e5b7c7d3a9f102b6d4c8e1a55"],
    )

    @classmethod
    def of(cls, page: SessionPage, next_cursor: str | None) -> dict[str, Any]:
        listed = [
            {
                "session_id": str(session.session_id),
                "created_at": format_time(session.created_at),
                "user_id": session.user_id,
                "last_activity": format_time(session.last_activity),
                "total_messages": session.message_count,
            }
            for session in page.sessions
        ]
        return {
            "sessions": listed,
            "total": page.total,
            **({"next": next_cursor} if next_cursor is not None else {}),
        }


class DeletedOut(BaseModel):
    message: str = Field(examples=[f"Session {_ID} deleted"])


class HitOut(BaseModel):
    session_id: str = Field(examples=[_ID])
    user_id: str | None = Field(examples=["user123"])
    seq: int = Field(description="its place in the session, from 1", examples=[1])
    role: Role
    created_at: str = Field(examples=[_TIME])
    snippet: str = Field(
        description="the content around the first hit, as it was stored: text, never markup",
        examples=["Điều kiện tham gia đấu thầu?"],
    )
    snippet_start: int = Field(description="where in the content the snippet begins", examples=[0])
    content_characters: int = Field(description="how long the content is", examples=[28])
    marks: list[tuple[int, int]] = Field(
        description="begin and end of each hit in the snippet; like all places here in Unicode code points",
        examples=[[(0, 9)]],
    )


class FoundOut(BaseModel):
    hits: list[HitOut] = Field(description="newest first")
    searched_from: str = Field(
        description="the range has been searched from its end back to here", examples=[_TIME]
    )
    partial: bool = Field(description="it took long: the page ended before it was full", examples=[False])
    next: str | None = Field(
        None,
        description="`after` of the next page; absent when the whole range has been searched",
        examples=["1762502400000.1763116200123.01998f2e5b7c7d3a9f102b6d4c8e1a55.2"],
    )


class ReportListedOut(BaseModel):
    name: str = Field(examples=["sessions_per_day"])
    definition: str = Field(examples=["How many sessions were created on each day of the range."])
    parameters: list[str] = Field(description="those that it looks at", examples=[["from", "to", "timezone"]])


class ReportListOut(BaseModel):
    reports: list[ReportListedOut]


class ColumnOut(BaseModel):
    name: str = Field(examples=["sessions"])
    unit: Literal["count", "milliseconds", "ratio", "percent", "time", "text"]


class ReportOut(BaseModel):
    report: str = Field(examples=["sessions_per_day"])
    definition: str = Field(examples=["How many sessions were created on each day of the range."])
    from_: str = Field(alias="from", examples=[_TIME])
    to: str = Field(description="exclusive", examples=[_TIME])
    timezone: str = Field(examples=["Asia/Ho_Chi_Minh"])
    granularity: Granularity | None = Field(description="of a series", examples=["day"])
    source: Literal["roll-ups", "messages"] = Field(description="what it was read from")
    complete: bool = Field(description="false: the roll-ups don't have all sessions yet", examples=[True])
    lag_seconds: float = Field(description="how far the roll-ups are behind", examples=[0.4])
    columns: list[ColumnOut]
    rows: list[dict[str, Any]] = Field(examples=[[{"day": "2025-11-14", "sessions": 3}]])
    sql: str = Field(
        description="the statement, as it could be typed",
        examples=[
            "SELECT day, sessions FROM analytics.sessions_daily WHERE day >= '2025-11-14' ORDER BY day"
        ],
    )


class StoreOut(BaseModel):
    status: Literal["pass", "warn", "fail"]
    state: str = Field(description="for people", examples=["source of truth"])


class ReadyOut(BaseModel):
    status: Literal["pass", "warn", "fail"]
    mode: Literal["hybrid", "redis-only", "postgres"]
    embedded: bool = Field(description="the servers were started by this service", examples=[False])
    version: str = Field(examples=["0.1.0"])
    stores: dict[str, StoreOut]


class LiveOut(BaseModel):
    status: Literal["pass"] = "pass"
    version: str = Field(examples=["0.1.0"])


class FieldProblem(BaseModel):
    path: str = Field(examples=["body.messages.0.role"])
    code: str = Field(examples=["literal_error"])
    detail: str = Field(examples=["Input should be 'user', 'assistant', 'system' or 'tool'"])


class Problem(BaseModel):
    """RFC 9457."""

    type: str = Field(examples=["urn:chat-sessions:problem:session_not_found"])
    title: str = Field(examples=["Not Found"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=["Session not found"])
    code: str = Field(description="stable; what programs read", examples=["session_not_found"])
    hint: str | None = Field(None, description="what to do about it", examples=["begin a new session"])
    errors: list[FieldProblem] | None = Field(None, description="a 422 names each field")
    current_seq: int | None = Field(None, description="of a 412", examples=[2])
