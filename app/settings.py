"""Every setting: its name, its default, what it may be. Read once, here and nowhere else.

Values come from the environment and, below it, from `.env` in the working directory.
"""

from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import parse_qsl, urlsplit
from zoneinfo import available_timezones

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.errors import StartRefused

KIB = 1024
MIB = 1024 * 1024

_Whole = Annotated[int, Field(ge=1, le=2**31 - 1)]

# In place of pydantic's own words for a text that is not of the type.
_SHOULD_BE = {
    "bool_parsing": "should be true or false",
    "int_parsing": "should be a whole number",
    "float_parsing": "should be a number",
}


class Settings(BaseSettings):
    """A field's name in capitals is the variable's name; its description is the line in the README."""

    model_config = SettingsConfigDict(env_file=".env", env_file_encoding="utf-8", extra="ignore", frozen=True)

    # The guide's own, with its defaults.
    enable_redis_sessions: bool = Field(default=True, description="false: PostgreSQL alone, no Redis at all")
    session_ttl_seconds: Annotated[int, Field(ge=1, le=10 * 366 * 86400)] = Field(
        3600, description="how long a session lives in Redis after its last use, and counts as active"
    )
    session_max_messages: Annotated[int, Field(ge=1, le=10_000)] = Field(
        100,
        description="the newest messages that Redis holds of a session, and the default page of a history",
    )
    redis_db_sessions: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        1, description="the Redis database of the sessions"
    )

    # The stores.
    redis_only_mode: bool | None = Field(
        None, description="true: the guide's system, Redis alone is the source of truth"
    )
    database_url: str | None = Field(
        None,
        description="postgresql://user:password@host:5432/database; unset: an embedded server",
        repr=False,
    )
    redis_url: str | None = Field(
        None, description="redis://host:6379; unset: an embedded server", repr=False
    )
    redis_db_aux: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        2, description="the Redis database of everything but sessions (Redis-only mode)"
    )
    redis_timeout_ms: Annotated[int, Field(ge=1, le=60_000)] = Field(
        250, description="nobody waits longer for Redis in hybrid mode"
    )
    database_pool_size: Annotated[int, Field(ge=1, le=500)] = Field(
        8, description="PostgreSQL connections of a worker"
    )
    database_pooler: Literal["none", "transaction"] = Field(
        "none", description="`transaction` behind pgbouncer in transaction mode"
    )
    cache_verify: Literal["lease", "always"] = Field(
        "lease",
        description="`always`: every cached read is compared with its row in PostgreSQL, "
        "for a Redis behind a proxy that hides failovers",
    )
    pg_outage_reads: Literal["serve", "refuse"] = Field(
        "serve", description="while PostgreSQL is out: serve cached history, labelled, or refuse it"
    )
    data_dir: Path = Field(Path(".data"), description="where embedded servers keep their data")
    analytics_timezone: str = Field(
        "UTC", description="whose days the reports have: a name like Asia/Ho_Chi_Minh"
    )

    # The service.
    host: str = Field("127.0.0.1", description="the address to listen on")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="the port to listen on")
    workers: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="processes that serve on it, each with its own PostgreSQL connections"
    )
    enable_pages: bool = Field(default=True, description="false: the API alone, without the pages for people")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what is logged")

    # The assistant.
    assistant: str = Field(
        "documents", description="`documents`, `openai`, or your own as `package.module:factory`"
    )
    assistant_timeout_seconds: Annotated[float, Field(gt=0, le=3600)] = Field(
        60, description="the deadline of an answer; later is 504"
    )
    documents_dir: Path | None = Field(
        None, description="the folder that `documents` answers from; unset: this project's documentation"
    )
    openai_base_url: str = Field(
        "https://api.openai.com/v1",
        description="an OpenAI-compatible endpoint: vLLM, Ollama, llama.cpp, OpenAI",
    )
    openai_api_key: str | None = Field(None, description="its key, where it wants one", repr=False)
    openai_model: str | None = Field(None, description="the model to ask; needed for `openai`")
    openai_system_prompt: str | None = Field(None, description="what the model is told first")
    openai_history_characters_max: _Whole = Field(
        60_000, description="how much of the conversation the model is sent"
    )
    openai_retries_max: Annotated[int, Field(ge=0, le=10)] = Field(
        2, description="how often a failed request is sent again, within the deadline"
    )

    # Bounds.
    session_window_bytes_max: _Whole = Field(
        MIB, description="the newest messages that Redis holds of a session, in bytes (hybrid mode)"
    )
    session_bytes_max: _Whole = Field(
        8 * MIB, description="a session's size in Redis-only mode; beyond is 413"
    )
    message_content_bytes_max: _Whole = Field(256 * KIB, description="a message's content")
    message_metadata_bytes_max: _Whole = Field(16 * KIB, description="a message's metadata as JSON")
    message_metadata_levels_max: Annotated[int, Field(ge=1, le=500)] = Field(
        32, description="how deep a message's metadata may be nested"
    )
    append_messages_max: Annotated[int, Field(ge=1, le=10_000)] = Field(
        100, description="messages of one append"
    )
    request_body_bytes_max: _Whole = Field(MIB, description="a request's body; beyond is 413")
    # The layout in Redis finds a user id's end within 2 KiB: 256 characters, six bytes each when escaped.
    user_id_characters_max: Annotated[int, Field(ge=1, le=256)] = Field(256, description="a user id")

    @model_validator(mode="before")
    @classmethod
    def _empty_is_unset(cls, values: dict[str, object]) -> dict[str, object]:
        """`NAME=` in the environment, a .env file or a compose file means: not given."""
        return {name: value for name, value in values.items() if value != ""}

    @field_validator("database_url")
    @classmethod
    def _postgresql(cls, value: str | None) -> str | None:
        # A password may have any character but @ in it; urlsplit would take fewer.
        if value is not None and not (
            value.partition("://")[0] in {"postgresql", "postgresql+asyncpg"}
            and _has_a_port_or_none(f"//{value.partition('://')[2].rpartition('@')[2]}")
            and _leads_to_a_host_or_none(value)
        ):
            escaped = ", with %40 for an @ in the password" if value.count("@") > 1 else ""
            raise ValueError(f"should be postgresql://user:password@host:5432/database{escaped}")
        _refuse_parameters(value, {"ssl", "sslmode"})
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis(cls, value: str | None) -> str | None:
        if value is not None and not (
            _has_a_port_or_none(value) and urlsplit(value).scheme in {"redis", "rediss", "unix"}
        ):
            raise ValueError("should be redis://host:6379 (rediss:// for TLS, unix:// for a socket)")
        _refuse_parameters(value, {"ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile", "ssl_keyfile"})
        return value

    @field_validator("analytics_timezone")
    @classmethod
    def _timezone(cls, value: str) -> str:
        # Where Python has no list of them, PostgreSQL, which has, is asked later.
        known = available_timezones()
        if known and value not in known:
            raise ValueError("should be the name of a time zone, like UTC or Asia/Ho_Chi_Minh")
        return value

    @model_validator(mode="after")
    def _one_source_of_truth(self) -> Self:
        if self.redis_only_mode and not self.enable_redis_sessions:
            raise ValueError(
                "REDIS_ONLY_MODE=true needs Redis, and ENABLE_REDIS_SESSIONS=false takes it away: set one of them"
            )
        if self.redis_db_sessions == self.redis_db_aux:
            raise ValueError(
                f"REDIS_DB_SESSIONS and REDIS_DB_AUX are both {self.redis_db_aux}: DBSIZE of the first is "
                "the number of sessions, so nothing else may live there"
            )
        return self


def read_settings(**overrides: object) -> Settings:
    """The settings of this process. Raises `StartRefused` that names each wrong one and what would be right."""
    try:
        return Settings(**overrides)  # type: ignore[arg-type]  # pydantic checks them
    except ValidationError as exc:
        raise StartRefused("\n".join(_explain(error) for error in exc.errors())) from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise StartRefused(f".env can't be read: {exc}", hint="make it a text file in UTF-8") from exc


def migration_database_url() -> str:
    """DATABASE_URL, for `alembic`: it alone is needed there."""
    url = read_settings().database_url
    if url is None:
        raise StartRefused(
            "DATABASE_URL is not set", hint="export DATABASE_URL=postgresql://user:password@host/db"
        )
    return url


def _has_a_port_or_none(url: str) -> bool:
    try:
        _ = urlsplit(url).port
    except ValueError:
        return False
    return True


def _leads_to_a_host_or_none(url: str) -> bool:
    """Whether the driver can make something of it, and of its host as a name."""
    from sqlalchemy.engine import make_url  # noqa: PLC0415 - 0.1 s that only who has a database should pay
    from sqlalchemy.exc import ArgumentError  # noqa: PLC0415 - see above

    try:
        url.encode()
        host = make_url(url).host or ""
        host.encode("idna")
    except (ValueError, ArgumentError):
        return False
    return "@" not in host


def _refuse_parameters(url: str | None, known: set[str]) -> None:
    """The drivers would fail on a parameter that they do not know, at the first connection."""
    query = url.rpartition("@")[2].partition("?")[2] if url else ""
    unknown = sorted({name for name, _ in parse_qsl(query, keep_blank_values=True)} - known)
    if unknown:
        raise ValueError(
            f"has the parameter {', '.join(unknown)}: leave it out (known: {', '.join(sorted(known))})"
        )


def _explain(error: object) -> str:
    fields = dict(error)  # type: ignore[call-overload]  # pydantic's ErrorDetails
    message = _SHOULD_BE.get(str(fields["type"]), str(fields["msg"]).removeprefix("Value error, "))
    name = ".".join(str(part) for part in fields["loc"]).upper()
    if not name:
        return message
    # A URL holds a password: its value stays out of the log.
    shown = "" if name.endswith(("_URL", "_KEY")) else f"={fields['input']}"
    return f"{name}{shown}: {message[0].lower()}{message[1:]}"
