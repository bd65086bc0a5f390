"""JSON that can be stored as it was sent, or a refusal that names the field. Nothing is silently changed."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

_INTEGER_DIGITS_MAX = 4000

# More than the settings allow of metadata, and far less than writing and sorting JSON can recurse.
_LEVELS_MAX = 512


@dataclass(frozen=True, slots=True)
class Flaw:
    """What can't be kept: where it stands, as `messages.0.content`, or None for the whole; what kind of flaw it is, and why."""

    path: str | None
    code: str
    detail: str

    def __str__(self) -> str:
        return self.detail if self.path is None else f"{self.path}: {self.detail}"


class NotStorable(ValueError):
    """`flaws` are all that were found, at least one."""

    def __init__(self, *flaws: Flaw) -> None:
        super().__init__("; ".join(str(flaw) for flaw in flaws))
        self.flaws = flaws


@dataclass(frozen=True, slots=True)
class _Marked:
    """Stands in the parsed value where something can't be kept, until its path is known."""

    code: str
    detail: str
    key: str | None = None


def parse(text: bytes) -> Any:
    """The value, in which every text and number can be kept by both stores.

    Raises `NotStorable`; the codes of its flaws: `invalid_json`, `too_deep`, `text_not_storable`, `number_not_storable`,
    `duplicate_key`.
    """
    try:
        value = _DECODER.decode(text.decode())
    except UnicodeDecodeError as exc:
        raise NotStorable(Flaw(None, "invalid_json", f"should be UTF-8, byte {exc.start} is not")) from exc
    except json.JSONDecodeError as exc:
        wrong = f"should be JSON: {exc.msg} at line {exc.lineno}, column {exc.colno}"
        raise NotStorable(Flaw(None, "invalid_json", wrong)) from exc
    except RecursionError as exc:
        raise NotStorable(Flaw(None, "too_deep", "is nested too deeply")) from exc
    depth, flaws = _looked_through(value)
    if depth > _LEVELS_MAX:
        raise NotStorable(Flaw(None, "too_deep", f"is nested more than {_LEVELS_MAX} levels deep"))
    if flaws:
        raise NotStorable(*flaws)
    return value


def text_flaw(text: str) -> str | None:
    """Why a text can't be stored: PostgreSQL keeps no NUL, UTF-8 no half of a surrogate pair."""
    if "\0" in text:
        return "holds a NUL character (U+0000), which can't be stored"
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        return f"holds half of a surrogate pair (U+{ord(text[exc.start]):04X}), which is no text"
    return None


def levels(value: Any) -> int:
    """How deep a value is nested: 0 for a scalar, 1 for an object of scalars."""
    return _looked_through(value)[0]


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Marked:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
    return _Marked("duplicate_key", "is there more than once", key=twice)


def _integer(digits: str) -> int | _Marked:
    if len(digits.lstrip("-")) > _INTEGER_DIGITS_MAX:
        return _Marked("number_not_storable", f"is an integer of more than {_INTEGER_DIGITS_MAX:,} digits")
    return int(digits)


def _float(text: str) -> float | _Marked:
    value = float(text)
    if value in {float("inf"), float("-inf")}:
        return _Marked("number_not_storable", "is a number beyond the range of a double")
    if value == 0 and text.lower().partition("e")[0].strip("-0."):
        return _Marked("number_not_storable", "is a number so small that a double makes it zero")
    return value


#: Made once: `json.loads` makes one at every call with hooks.
_DECODER = json.JSONDecoder(
    object_pairs_hook=_pairs,
    parse_constant=lambda name: _Marked("number_not_storable", f"{name} is not a JSON number"),
    parse_int=_integer,
    parse_float=_float,
)


def _looked_through(value: Any) -> tuple[int, list[Flaw]]:
    """How deep it is nested, and where it can't be kept.

    Layer by layer, with the way to each value as (way to its parent, its name): only a flaw's is written out.
    """
    depth = 0
    found: list[tuple[_Way | None, _Marked]] = []
    layer: list[tuple[_Way | None, Any]] = [(None, value)]
    while layer:
        below: list[tuple[_Way | None, Any]] = []
        nested = False
        for way, one in layer:
            kind = type(one)
            if kind is str:
                if flaw := text_flaw(one):
                    found.append((way, _Marked("text_not_storable", flaw)))
            elif kind is dict:
                nested = True
                for key, child in one.items():
                    if flaw := text_flaw(key):
                        found.append((way, _Marked("text_not_storable", f"has a key that {flaw}")))
                    below.append(((key, way), child))
            elif kind is list:
                nested = True
                below += [((index, way), child) for index, child in enumerate(one)]
            elif kind is _Marked:
                found.append((way if one.key is None else (one.key, way), one))
        depth += nested
        layer = below
    return depth, [Flaw(_path(way), flaw.code, flaw.detail) for way, flaw in found]


_Way = tuple[str | int, Any]


def _path(way: "_Way | None") -> str | None:
    names = []
    while way is not None:
        name, way = way
        names.append(_shown(name) if isinstance(name, str) else str(name))
    return ".".join(reversed(names)) if names else None


def _shown(key: str) -> str:
    """A key as it can stand in an error: any key may be sent, not every one can be printed."""
    return json.dumps(key)[1:-1][:100]
