"""JSON that can be stored as it was sent, or a refusal that names the field. Nothing is silently changed."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from app.api.problems import refused_field, refused_fields

_INTEGER_DIGITS_MAX = 4000

# More than the settings allow of metadata, and far less than writing and sorting JSON can recurse.
_LEVELS_MAX = 512


@dataclass(frozen=True, slots=True)
class _Flaw:
    """Stands in the parsed value where something can't be kept, until its path is known."""

    code: str
    detail: str
    key: str | None = None


def parse(body: bytes) -> Any:
    """The value of a body, in which every text and number can be kept by both stores.

    Raises `RequestRefused`: `invalid_json`, `too_deep`, `text_not_storable`, `number_not_storable`,
    `duplicate_key`.
    """
    try:
        value = _DECODER.decode(body.decode())
    except UnicodeDecodeError as exc:
        raise refused_field("invalid_json", "body", f"should be UTF-8, byte {exc.start} is not") from exc
    except json.JSONDecodeError as exc:
        raise refused_field(
            "invalid_json", "body", f"should be JSON: {exc.msg} at line {exc.lineno}, column {exc.colno}"
        ) from exc
    except RecursionError as exc:
        raise refused_field("too_deep", "body", "is nested too deeply") from exc
    depth, found = _looked_through(value)
    if depth > _LEVELS_MAX:
        raise refused_field("too_deep", "body", f"is nested more than {_LEVELS_MAX} levels deep")
    flaws = [{"path": path, "code": flaw.code, "detail": flaw.detail} for path, flaw in found]
    if flaws:
        raise refused_fields(flaws[0]["code"], flaws)
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


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Flaw:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
    return _Flaw("duplicate_key", "is there more than once", key=twice)


def _integer(digits: str) -> int | _Flaw:
    if len(digits.lstrip("-")) > _INTEGER_DIGITS_MAX:
        return _Flaw("number_not_storable", f"is an integer of more than {_INTEGER_DIGITS_MAX:,} digits")
    return int(digits)


def _float(text: str) -> float | _Flaw:
    value = float(text)
    if value in {float("inf"), float("-inf")}:
        return _Flaw("number_not_storable", "is a number beyond the range of a double")
    if value == 0 and text.lower().partition("e")[0].strip("-0."):
        return _Flaw("number_not_storable", "is a number so small that a double makes it zero")
    return value


#: Made once: `json.loads` makes one at every call with hooks.
_DECODER = json.JSONDecoder(
    object_pairs_hook=_pairs,
    parse_constant=lambda name: _Flaw("number_not_storable", f"{name} is not a JSON number"),
    parse_int=_integer,
    parse_float=_float,
)


def _looked_through(value: Any) -> tuple[int, list[tuple[str, _Flaw]]]:
    """How deep it is nested, and where it can't be kept.

    Layer by layer, with the way to each value as (way to its parent, its name): only a flaw's is written out.
    """
    depth = 0
    found: list[tuple[_Way, _Flaw]] = []
    layer: list[tuple[_Way, Any]] = [(("body", None), value)]
    while layer:
        below: list[tuple[_Way, Any]] = []
        nested = False
        for way, one in layer:
            kind = type(one)
            if kind is str:
                if flaw := text_flaw(one):
                    found.append((way, _Flaw("text_not_storable", flaw)))
            elif kind is dict:
                nested = True
                for key, child in one.items():
                    if flaw := text_flaw(key):
                        found.append((way, _Flaw("text_not_storable", f"has a key that {flaw}")))
                    below.append(((key, way), child))
            elif kind is list:
                nested = True
                below += [((index, way), child) for index, child in enumerate(one)]
            elif kind is _Flaw:
                found.append((way if one.key is None else (one.key, way), one))
        depth += nested
        layer = below
    return depth, [(_path(way), flaw) for way, flaw in found]


_Way = tuple[str | int, Any]


def _path(way: "_Way | None") -> str:
    names = []
    while way is not None:
        name, way = way
        names.append(_shown(name) if isinstance(name, str) else str(name))
    return ".".join(reversed(names))


def _shown(key: str) -> str:
    """A key as it can stand in an error: any key may be sent, not every one can be printed."""
    return json.dumps(key)[1:-1][:100]
