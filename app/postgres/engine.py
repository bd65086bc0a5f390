"""The engine, and the edge where a driver's error becomes one of ours.

One SQLAlchemy engine owns the pool; hot statements run on its asyncpg connection.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import date
from typing import Any, Literal

import asyncpg
from sqlalchemy import event
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_dbapi
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, InvalidatePoolError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from app.coherence.ports import Interrupted
from app.errors import ChatError, CommitUnknown, DurableStoreUnavailable

log = logging.getLogger("chat_sessions.postgres")

#: Longer than any of our statements takes, shorter than a caller's patience.
STATEMENT_TIMEOUT_SECONDS = 3.0

#: The client's own limit, for a server that does not even answer to its statement_timeout.
COMMAND_TIMEOUT_SECONDS = STATEMENT_TIMEOUT_SECONDS + 1.0

CONNECT_TIMEOUT_SECONDS = 2.0

#: A server of which there was a sign so lately is there: the statement was what took too long.
_SIGN_SECONDS = 1.0

#: How often one that let somebody wait in vain is tried by a request, one at a time. The heartbeat tries all the time, but
#: it may be what can't connect.
_TRY_AGAIN_SECONDS = 5.0

#: PostgreSQL counts days from here.
_POSTGRES_DAY_ZERO = date(2000, 1, 1).toordinal()

# `synchronous_commit`: whatever the role says, an acknowledged write is on disk.
_SESSION_SETTINGS = {
    "statement_timeout": f"{STATEMENT_TIMEOUT_SECONDS:g}s",
    "idle_in_transaction_session_timeout": f"{STATEMENT_TIMEOUT_SECONDS:g}s",
    "synchronous_commit": "on",
}

# One round trip. Behind a transaction pooler what a connection was started with does not reach the server.
_BEGIN = {
    "none": "BEGIN",
    "transaction": "; ".join(
        ["BEGIN", *(f"SET LOCAL {name} = '{value}'" for name, value in _SESSION_SETTINGS.items())]
    ),
}

# What PostgreSQL says when it, and not our statement, is the matter: connection trouble (08), a lack of
# resources (53), an operator's intervention or a cancelled statement (57), system errors (58), read-only
# (25006: a standby), lock and deadlock time-outs (55P03, 40P01).
_OUTAGE_CLASSES = frozenset({"08", "53", "57", "58"})
_OUTAGE_STATES = frozenset({"25006", "25P03", "28000", "28P01", "3D000", "40001", "40P01", "55000", "55P03"})


def sqlalchemy_url(url: str) -> str:
    """`postgresql://` and `postgresql+asyncpg://` are the same to us; `sslmode` is what asyncpg calls `ssl`."""
    parsed = make_url(url).set(drivername="postgresql+asyncpg")
    if "sslmode" in parsed.query:
        parsed = parsed.set(query={"ssl": parsed.query["sslmode"]})
    return parsed.render_as_string(hide_password=False)


def create_engine(
    url: str, *, application_name: str, pool_size: int = 8, pooler: Literal["none", "transaction"] = "none"
) -> AsyncEngine:
    """An engine for `url`. Connects on first use.

    `pooler="transaction"` is for pgbouncer and its like: no prepared statement outlives its transaction.
    """
    connect_args: dict[str, Any] = {
        "timeout": CONNECT_TIMEOUT_SECONDS,
        "command_timeout": COMMAND_TIMEOUT_SECONDS,
    }
    if pooler == "transaction":
        connect_args |= {"statement_cache_size": 0, "prepared_statement_cache_size": 0}
    else:
        connect_args["server_settings"] = {
            "application_name": application_name,
            # Left to itself, PostgreSQL plans a statement over a partitioned table anew at every execution:
            # measured, 1.3 ms at 29 partitions and 17 ms at 121, against 0.1 and 0.4 ms.
            "plan_cache_mode": "force_generic_plan",
            # A plan that was made while a table was small would read all of it, until something analyzes the table:
            # measured after an import of 300,000 sessions, an append took 29 to 101 ms. Where it can't be helped,
            # PostgreSQL 17 and before take the cost of it for a statement that is worth compiling.
            "enable_seqscan": "off",
            "jit": "off",
            **_SESSION_SETTINGS,
        }
    engine = create_async_engine(
        sqlalchemy_url(url),
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=CONNECT_TIMEOUT_SECONDS,
        pool_use_lifo=True,
        connect_args=connect_args,
    )

    @event.listens_for(engine.sync_engine, "connect")
    def keep_dates(dbapi_connection: Any, _record: object) -> None:
        # asyncpg sends Python's first day, our month of ids without a time, as -infinity.
        dbapi_connection.run_async(
            lambda driver: driver.set_type_codec(
                "date",
                schema="pg_catalog",
                format="tuple",
                encoder=lambda day: (day.toordinal() - _POSTGRES_DAY_ZERO,),
                decoder=lambda days: date.fromordinal(days[0] + _POSTGRES_DAY_ZERO),
            )
        )

    @event.listens_for(engine.sync_engine, "checkout")
    def refuse_closed(dbapi_connection: Any, _record: object, _proxy: object) -> None:
        # The event loop has seen the server's end of the connection already: no round trip is needed to
        # know. The pool then drops every connection of that age and makes a new one.
        if dbapi_connection.driver_connection.is_closed():
            raise InvalidatePoolError

    return engine


class Database:
    """Connections of one engine, and when the primary last answered on one of them. `pooler` as it was made with.

    With `remembers_outages` a server that let somebody wait in vain, because it hangs or its network swallows packets, is
    not waited for by others: until it answers, or `answers_again` says so, all but one each few seconds are refused at once
    (a circuit breaker: Nygard, "Release It!"). One that refuses by itself is asked as ever.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        pooler: Literal["none", "transaction"] = "none",
        remembers_outages: bool = False,
    ) -> None:
        self.engine = engine
        self._begin = _BEGIN[pooler]
        self._heard_at = time.monotonic()
        self._remembers_outages = remembers_outages
        self._out = False
        self._tried_at = 0.0
        self._sign_at = self._heard_at

    def seconds_since_heard(self) -> float:
        return time.monotonic() - self._heard_at

    def answers_again(self) -> None:
        """Somebody else had an answer, on a connection of his own."""
        self._sign_at = time.monotonic()
        if self._out:
            self._out = False
            log.warning("PostgreSQL answers again")

    def _refuse_or_try(self) -> None:
        now = time.monotonic()
        if now - self._tried_at < _TRY_AGAIN_SECONDS:
            raise DurableStoreUnavailable("PostgreSQL did not answer a moment ago")
        # This one tries, and may wait as long as it takes: the others go on without it.
        self._tried_at = now + CONNECT_TIMEOUT_SECONDS

    def _failed(self, exc: Exception) -> Exception:
        now = time.monotonic()
        if self._remembers_outages and _was_waited_for(exc) and now - self._sign_at >= _SIGN_SECONDS:
            if not self._out:
                log.warning(
                    "PostgreSQL does not answer: requests that need it are refused at once until it does"
                )
            self._out = True
            self._tried_at = now
        return outage_or_same(exc)

    def _answered(self) -> None:
        self._heard_at = time.monotonic()
        self.answers_again()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[asyncpg.Connection]:
        """An asyncpg connection of the pool, for one statement each its own transaction.

        A connection that saw anything but an answer is dropped, never given to the next caller.
        """
        if self._out:
            self._refuse_or_try()
        try:
            # Without SQLAlchemy's own Connection around it, which cost a tenth of an append.
            pooled = await self.engine.raw_connection()
            driver = pooled.driver_connection
            assert driver is not None  # noqa: S101 - the asyncpg dialect always has one
            try:
                yield driver
            except BaseException as exc:
                if not await _rolled_back(driver, exc):
                    driver.terminate()
                    pooled.invalidate()
                raise
            finally:
                pooled.close()
            self._answered()
        except (ChatError, Interrupted):
            raise
        except Exception as exc:
            raise self._failed(exc) from exc

    @asynccontextmanager
    async def core(self) -> AsyncIterator[AsyncConnection]:
        """A connection for SQLAlchemy Core, for what is not hot. Reads only: nothing is committed."""
        if self._out:
            self._refuse_or_try()
        try:
            async with self.engine.connect() as conn:
                yield conn
        except Exception as exc:
            raise self._failed(exc) from exc
        self._answered()

    @asynccontextmanager
    async def transaction(self, *, lock_timeout_ms: int | None = None) -> AsyncIterator[asyncpg.Connection]:
        """A transaction that is committed at the end of the block, durably, or left without a trace.

        `lock_timeout_ms`: how long a statement waits for a lock; None: as long as for anything else.
        Raises `CommitUnknown` where the connection broke during the commit.
        """
        async with self.connection() as conn:
            await conn.execute(
                self._begin
                if lock_timeout_ms is None
                else f"{self._begin}; SET LOCAL lock_timeout = {lock_timeout_ms}"
            )
            yield conn
            try:
                await conn.execute("COMMIT")
            except (OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.PostgresConnectionError) as exc:
                raise CommitUnknown from exc
            except asyncpg.PostgresError as exc:
                # A server that goes down may have written the commit record before it says so.
                if (exc.sqlstate or "").startswith("57P"):
                    raise CommitUnknown from exc
                raise

    async def close(self) -> None:
        await self.engine.dispose()


def _causes(exc: Exception) -> tuple[BaseException | None, BaseException | None]:
    """As SQLAlchemy translates the driver's error, where its Connection does not wrap that, and as the driver says it."""
    translated: BaseException | None = exc.orig if isinstance(exc, DBAPIError) else exc
    cause = translated.__cause__ if isinstance(translated, AsyncAdapt_asyncpg_dbapi.Error) else translated
    return translated, cause


def _was_waited_for(exc: Exception) -> bool:
    """Nothing came in time. Not so where no connection was free: then the server answers somebody else."""
    _, cause = _causes(exc)
    return isinstance(cause, TimeoutError | asyncio.TimeoutError)


def outage_or_same(exc: Exception) -> Exception:
    """`DurableStoreUnavailable` for an error that says PostgreSQL can't serve now; else the error itself."""
    translated, cause = _causes(exc)
    state = getattr(cause, "sqlstate", None) or getattr(translated, "sqlstate", None)
    if state is not None:
        if state == "42501":
            return DurableStoreUnavailable(
                f"PostgreSQL can't serve now: {cause}",
                hint="give the account of DATABASE_URL this right; what makes tables, such as `chat-sessions partitions`, may "
                "be run as another account",
            )
        if state[:2] in _OUTAGE_CLASSES or state in _OUTAGE_STATES:
            return DurableStoreUnavailable(f"PostgreSQL can't serve now: {cause}")
        # A table or its schema is missing: which one is said differs between versions.
        if state in {"42P01", "3F000"}:
            return DurableStoreUnavailable(
                f"the database has not the schema of this version: {cause}", hint="run `alembic upgrade head`"
            )
        return exc
    if isinstance(
        cause,
        OSError
        | TimeoutError
        | PoolTimeoutError
        | asyncpg.InterfaceError
        # What asyncpg says when the server's farewell came between two of our statements.
        | asyncpg.InternalClientError
        | asyncio.TimeoutError,
    ):
        return DurableStoreUnavailable(f"PostgreSQL can't be reached: {str(cause) or type(cause).__name__}")
    return exc


async def _rolled_back(driver: asyncpg.Connection, exc: BaseException) -> bool:
    """True where the connection is known to be fit for the next caller."""
    if not isinstance(exc, ChatError | Interrupted | asyncpg.PostgresError) or isinstance(exc, CommitUnknown):
        return False
    try:
        if driver.is_in_transaction():
            await driver.execute("ROLLBACK")
    except (
        OSError,
        TimeoutError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,
        asyncpg.PostgresError,
    ):
        return False
    return not driver.is_closed()
