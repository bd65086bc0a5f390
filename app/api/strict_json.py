"""JSON that can be stored as it was sent, or a refusal that names the field. Nothing is silently changed."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from app.api.problems import RequestRefused, refused_field

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
        value = json.loads(
            body.decode(),
            object_pairs_hook=_pairs,
            parse_constant=lambda name: _Flaw("number_not_storable", f"{name} is not a JSON number"),
            parse_int=_integer,
            parse_float=_float,
        )
    except UnicodeDecodeError as exc:
        raise refused_field("invalid_json", "body", f"should be UTF-8, byte {exc.start} is not") from exc
    except json.JSONDecodeError as exc:
        raise refused_field(
            "invalid_json", "body", f"should be JSON: {exc.msg} at line {exc.lineno}, column {exc.colno}"
        ) from exc
    except RecursionError as exc:
        raise refused_field("too_deep", "body", "is nested too deeply") from exc
    if levels(value) > _LEVELS_MAX:
        raise refused_field("too_deep", "body", f"is nested more than {_LEVELS_MAX} levels deep")
    flaws = [{"path": path, "code": flaw.code, "detail": flaw.detail} for path, flaw in _flaws("body", value)]
    if flaws:
        raise RequestRefused(
            flaws[0]["code"], "; ".join(f"{flaw['path']}: {flaw['detail']}" for flaw in flaws), errors=flaws
        )
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
    depth, layer = 0, [value]
    while any(isinstance(one, dict | list) for one in layer):
        depth += 1
        layer = [
            child
            for one in layer
            if isinstance(one, dict | list)
            for child in (one.values() if isinstance(one, dict) else one)
        ]
    return depth


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


def _flaws(path: str, value: Any) -> Iterator[tuple[str, _Flaw]]:
    stack = [(path, value)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, _Flaw):
            yield path if value.key is None else f"{path}.{_shown(value.key)}", value
        elif isinstance(value, str):
            if flaw := text_flaw(value):
                yield path, _Flaw("text_not_storable", flaw)
        elif isinstance(value, dict):
            for key, child in value.items():
                if flaw := text_flaw(key):
                    yield path, _Flaw("text_not_storable", f"has a key that {flaw}")
                stack.append((f"{path}.{_shown(key)}", child))
        elif isinstance(value, list):
            stack.extend((f"{path}.{index}", child) for index, child in enumerate(value))


def _shown(key: str) -> str:
    """A key as it can stand in an error: any key may be sent, not every one can be printed."""
    return json.dumps(key)[1:-1][:100]
