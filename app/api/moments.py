"""Moments in an address: a day, or RFC 3339."""

import re
from datetime import UTC, date, datetime, time
from typing import TypeVar

from pydantic import BeforeValidator

from app.api.schemas import RFC3339
from app.chat import cut_to_milliseconds

_Moment = TypeVar("_Moment", date, datetime)

# Not to the calendar's ends: a moment there has no other zone.
_YEARS = range(1970, 9999)


def day_or_moment(value: object) -> datetime | date:
    """What it says; raises `ValueError` with what it should be."""
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value, re.ASCII):
        return _in_calendar(date.fromisoformat(value))
    if isinstance(value, str) and RFC3339.fullmatch(value):
        return _in_calendar(datetime.fromisoformat(value)).astimezone(UTC)
    raise ValueError("should be a day such as 2025-11-14, or RFC 3339 such as 2025-11-14T10:30:00+07:00")


def _in_calendar(found: _Moment) -> _Moment:
    if found.year not in _YEARS:
        raise ValueError(f"should lie between the years {_YEARS[0]} and {_YEARS[-1]}")
    return found


def moment(value: object) -> datetime:
    """The same where a day is its midnight in UTC, to the millisecond."""
    found = day_or_moment(value)
    return cut_to_milliseconds(found if isinstance(found, datetime) else datetime.combine(found, time(), UTC))


#: Stands after `Query` in an `Annotated`. A day stays one: whose midnight it is, the time zone says.
DAY_OR_MOMENT = (BeforeValidator(day_or_moment),)

#: The same where a day is its midnight in UTC.
MOMENT = (BeforeValidator(moment),)
