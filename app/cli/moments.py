"""Times on the command line."""

import re
from datetime import UTC, date, datetime

import typer

# Room for the days before a range that a report looks back on, and after it.
_YEARS = range(1970, 9999)


def moment(text: str) -> datetime:
    """A date or a time as people type it; UTC where it does not say otherwise."""
    try:
        found = datetime.fromisoformat(text)
        if found.tzinfo is None:
            found = found.replace(tzinfo=UTC)
        found = found.astimezone(UTC)
    except (ValueError, OverflowError) as exc:
        raise typer.BadParameter(f"{text!r} is no time like 2026-01-31 or 2026-01-31T09:30+07:00") from exc
    if found.year not in _YEARS:
        raise typer.BadParameter(f"{text!r} is not between the years {_YEARS[0]} and {_YEARS[-1]}")
    return found


def day_or_moment(text: str) -> datetime | date:
    """A moment; a day stays one, for its midnight is in a zone that is not known here."""
    found = moment(text)
    return found.date() if re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII) else found
