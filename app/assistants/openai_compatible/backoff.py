"""When to try again: what the server asks for, else exponentially later, always with jitter.

`Retry-After` is a lower bound, in seconds or as an HTTP date. A date is compared with the answer's own
`Date`, so that a difference between the two clocks does not matter.
"""

import random
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

#: Conflict is in here as in OpenAI's own client: it is what their gateway says for a lock it did not get.
RETRIED_STATUSES = frozenset({408, 409, 429, 500, 502, 503, 504})

_FIRST_SECONDS = 0.5
_LONGEST_SECONDS = 8.0
# Everybody who was sent away together comes back spread over this time.
_SPREAD_SECONDS = 0.25

_SECONDS = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")


def wait_seconds(attempt: int, asked_seconds: float | None) -> float:
    """The time to wait after failed attempt number `attempt`, counted from 1."""
    if asked_seconds is not None:
        return asked_seconds + random.uniform(0, _SPREAD_SECONDS)  # noqa: S311 - jitter, not a secret
    longest: float = min(_LONGEST_SECONDS, _FIRST_SECONDS * 2 ** (attempt - 1))
    return random.uniform(longest / 2, longest)  # noqa: S311 - jitter, not a secret


def retry_after_seconds(headers: httpx.Headers) -> float | None:
    """What the header asks for, None where it is absent or says nothing."""
    value = headers.get("retry-after", "").strip()
    if _SECONDS.fullmatch(value):
        return float(value)
    moment = _date(value)
    if moment is None:
        return None
    return max(0.0, (moment - (_date(headers.get("date", "")) or datetime.now(UTC))).total_seconds())


def _date(value: str) -> datetime | None:
    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
