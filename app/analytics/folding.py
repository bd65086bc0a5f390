"""Text as the search compares it: without case and without accents, and a pattern that finds it in PostgreSQL.

Every character folds by itself, to one character or to none, so that a place in folded text is a place in the text.
A combining mark (U+0300 to U+036F) folds to nothing, a letter with such marks to its base letter, đ to d, upper case
to lower case. So NFC and NFD fold alike, and so does Vietnamese with and without its accents. Only characters
below U+3000 are folded: Latin, Greek, Cyrillic and their like; all others stand for themselves.
"""

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

# The canonical decompositions to ASCII end below it (the last is U+226F, the Kelvin sign is U+212A); a test looks.
_FOLDED_BELOW = 0x3000

_MARK = re.compile("[\u0300-\u036f]")
# What has no canonical decomposition, and is the accent of a letter to everybody who types.
_STROKES = {"đ": "d", "Đ": "D"}


def _fold_one(character: str) -> str:
    bare = _MARK.sub("", unicodedata.normalize("NFD", character))
    if len(bare) > 1:
        return character
    lower = _STROKES.get(bare, bare).lower()
    return lower if len(lower) <= 1 else bare


_FOLDED = {code: folded for code in range(_FOLDED_BELOW) if (folded := _fold_one(chr(code))) != chr(code)}


def fold(text: str) -> str:
    """The text as it is compared. Folding twice changes nothing."""
    return text.translate(_FOLDED)


def places(text: str) -> list[int]:
    """Where in `text` each character of `fold(text)` stands, and at last the length of `text`."""
    return [index for index, character in enumerate(text) if _FOLDED.get(ord(character), character)] + [
        len(text)
    ]


@lru_cache
def _classes() -> dict[str, str]:
    """The members of a class for all that folds to a character, itself included."""
    variants: dict[str, str] = {}
    for code, folded in _FOLDED.items():
        if folded:
            variants[folded] = variants.get(folded, folded) + chr(code)
    # For a class, not for the pattern: what would end or negate one stands behind a backslash.
    return {folded: _escaped(folded) + members[1:] for folded, members in variants.items()}


def _escaped(character: str) -> str:
    r"""The character itself, in PostgreSQL's regular expressions: `\` before a letter or a digit means something."""
    return (
        character if character.isalnum() or character == "_" or not character.isascii() else f"\\{character}"
    )


@lru_cache
def _not_in_words() -> str:
    """A class of at least all that may stand beside a word: all but the letters, digits and `_` of ASCII, accented
    or not. Their own class of PostgreSQL's depends on the locale.
    """
    return "[^" + "".join(_classes().get(one, one) for one in "abcdefghijklmnopqrstuvwxyz0123456789_") + "]"


def substring_pattern(folded: str) -> str:
    """A regular expression for PostgreSQL that matches a text exactly if `folded` occurs in its folding.

    For `COLLATE "C"`: nothing in it is left to a locale.
    """
    return "".join(_loosely(folded))


def _loosely(folded: str) -> Iterator[str]:
    for character in folded:
        members = _classes().get(character)
        yield f"[{members}]" if members else _escaped(character)
        yield "[\u0300-\u036f]*"


def phrase_pattern(words: tuple[str, ...]) -> str:
    """A regular expression for PostgreSQL that matches every text in whose folding the words follow each other,
    whole and with no other word between, and few others.
    """
    edge = _not_in_words()
    middle = f"{edge}+".join(map(substring_pattern, words))
    return f"(?:^|{edge}){middle}(?:$|{edge})"
