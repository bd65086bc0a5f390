"""Which of the driver's errors say that PostgreSQL can't serve now, however SQLAlchemy has wrapped them."""

import asyncpg
import pytest
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_dbapi
from sqlalchemy.exc import DBAPIError

from app.errors import DurableStoreUnavailable
from app.postgres.engine import outage_or_same


def bare(cause: Exception) -> Exception:
    return cause


def translated(cause: Exception) -> Exception:
    """As the pool raises it while it connects."""
    error = AsyncAdapt_asyncpg_dbapi.Error(str(cause), cause)
    error.__cause__ = cause
    return error


def wrapped(cause: Exception) -> Exception:
    """As SQLAlchemy's Connection raises it."""
    return DBAPIError("SELECT 1", (), translated(cause))


@pytest.mark.parametrize("form", [bare, translated, wrapped])
@pytest.mark.parametrize(
    "cause",
    [
        asyncpg.InternalClientError("cannot switch to state 15; another operation (2) is in progress"),
        asyncpg.InterfaceError("connection is closed"),
        asyncpg.CannotConnectNowError("the database system is starting up"),
        ConnectionResetError("reset by peer"),
    ],
    ids=lambda cause: type(cause).__name__,
)
def test_an_outage_is_one_in_every_form(form, cause):
    assert isinstance(outage_or_same(form(cause)), DurableStoreUnavailable)


@pytest.mark.parametrize("form", [bare, translated, wrapped])
def test_a_fault_of_ours_stays_what_it_is(form):
    error = form(asyncpg.UndefinedColumnError("no such column"))

    assert outage_or_same(error) is error
