"""The languages of the pages: which one a request wants, and how numbers and sizes are written in it."""

import re
from dataclasses import dataclass

from fastapi import Request

from app.api.problems import refused_field
from app.web.texts import TEXTS

#: As they call themselves; the first one where nobody asks for another.
LANGUAGES = {"en": "English", "vi": "Tiếng Việt"}

COOKIE = "lang"

_KIB = 1024
_TENTHS_SHOWN_BELOW = 10
_SECOND_MS = 1000
_SECONDS_SHOWN_MAX = 120
_MINUTES_SHOWN_MAX = 120
_HOURS_SHOWN_MAX = 48

_SWAPPED = str.maketrans(",.", ".,")

# A list of tags with their weights, RFC 9110 12.5.4. The region of a tag does not matter here.
_WANTED = re.compile(r"\s*([A-Za-z]{1,8})(?:-[A-Za-z0-9-]*)?\s*(?:;\s*q=([01](?:\.[0-9]{0,3})?))?\s*(?:,|$)")


@dataclass(frozen=True, slots=True)
class Language:
    """One of `LANGUAGES`, by its code."""

    code: str

    def text(self, key: str, **values: object) -> str:
        """The text of a key, its `{name}`s filled in. Raises KeyError for a key that there is not."""
        english, vietnamese = TEXTS[key]
        text = vietnamese if self.code == "vi" else english
        return text.format(**values) if values else text

    def number(self, value: float, digits: int = 0) -> str:
        """1,234.5 in English, 1.234,5 in Vietnamese."""
        shown = f"{value:,.{digits}f}"
        return shown.translate(_SWAPPED) if self.code == "vi" else shown

    def short(self, value: float) -> str:
        """Three figures at most, for where there is no room: 950, 1.2k, 12k, 3.4M."""
        for unit, name in ((1_000_000, "M"), (1_000, "k")):
            if value >= unit * 0.9995:
                amount = value / unit
                return f"{self.number(amount, 1 if amount < _TENTHS_SHOWN_BELOW - 0.05 else 0)}{name}"
        return self.number(value)

    def percent(self, part: float, whole: float) -> str:
        """With one digit; not 100 % or 0 % unless it is so."""
        share = 1000 * part / whole
        tenths = round(share)
        if tenths in {0, 1000} and part not in {0, whole}:
            tenths = 1 if tenths == 0 else 999
        return self.text("unit.percent", value=self.number(tenths / 10, 1))

    def size(self, size_bytes: int) -> str:
        """In the largest unit of which there is one."""
        amount, units = float(size_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
        while amount >= _KIB and len(units) > 1:
            amount /= _KIB
            del units[0]
        return f"{self.number(amount, 0 if units[0] == 'B' else 1)} {units[0]}"

    def duration(self, seconds: float) -> str:
        """In the unit that is read at once. What took no time at all is 0 s, and nothing else is."""
        milliseconds = round(seconds * 1000)
        if seconds > 0 and milliseconds < _SECOND_MS:
            return f"{max(1, milliseconds)} ms"
        if seconds < _SECONDS_SHOWN_MAX:
            digits = 1 if 0 < seconds < _TENTHS_SHOWN_BELOW else 0
            return self.text("unit.seconds", value=self.number(seconds, digits))
        minutes = seconds / 60
        if minutes < _MINUTES_SHOWN_MAX:
            return self.text("unit.minutes", value=self.number(minutes))
        hours = minutes / 60
        if hours < _HOURS_SHOWN_MAX:
            return self.text("unit.hours", value=self.number(hours))
        return self.text("unit.days", value=self.number(hours / 24))


async def known_language(request: Request) -> None:
    """Refuses a `lang` that the pages are not written in."""
    asked = request.query_params.get(COOKIE)
    if asked is not None and asked not in LANGUAGES:
        raise refused_field("unknown_language", "query.lang", f"should be one of {', '.join(LANGUAGES)}")


def language_of(request: Request) -> Language:
    """That of the address, else of the cookie that an address has left, else what the browser prefers."""
    for asked in (request.query_params.get(COOKIE), request.cookies.get(COOKIE)):
        if asked in LANGUAGES:
            return Language(asked)
    wanted = {
        code.lower(): float(weight or 1)
        for code, weight in reversed(_WANTED.findall(request.headers.get("accept-language", "")))
    }
    return Language(max(LANGUAGES, key=lambda code: wanted.get(code, 0)))
