"""Fields of forms that are sent by GET: one that was left empty is sent all the same, and means: not given."""

from datetime import date, datetime
from typing import Annotated

from pydantic import BeforeValidator, Field

from app.api.moments import day_or_moment, moment

_OR_BLANK = BeforeValidator(lambda value: day_or_moment(value) if value else None)
_MOMENT_OR_BLANK = BeforeValidator(lambda value: moment(value) if value else None)

#: A day stays one: whose midnight it is, the time zone says.
SinceDay = Annotated[datetime | date | None, Field(alias="from"), _OR_BLANK]
UntilDay = Annotated[datetime | date | None, Field(alias="to"), _OR_BLANK]

#: The same where a day is its midnight in UTC.
Since = Annotated[datetime | None, Field(alias="from"), _MOMENT_OR_BLANK]
Until = Annotated[datetime | None, Field(alias="to"), _MOMENT_OR_BLANK]

UserId = Annotated[str, Field(max_length=256)]
