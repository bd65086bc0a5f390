"""Questions that are one but for accents, case and punctuation, added up."""

import re
from collections.abc import Iterable
from datetime import datetime

from app.analytics.folding import fold

#: A question as it is written, how often it was asked, when last, and a session that has it.
Asked = tuple[str, int, datetime, str]

_WORD = re.compile(r"\w+")


def most_asked(spellings: Iterable[Asked], limit: int) -> list[Asked]:
    """The most frequent questions, each as the first of its spellings; what is asked as often is in the order of its words.

    Spellings are one question where the search would find the words of each in the other, one after the other. A text
    without a word is itself.
    """
    questions: dict[str, Asked] = {}
    for spelling in spellings:
        key = " ".join(_WORD.findall(fold(spelling[0]))) or spelling[0].strip()
        known = questions.get(key)
        questions[key] = spelling if known is None else _together(known, spelling)
    ordered = sorted(questions.items(), key=lambda item: (-item[1][1], item[0]))
    return [question for _, question in ordered[:limit]]


def _together(one: Asked, other: Asked) -> Asked:
    return one[0], one[1] + other[1], max(one[2], other[2]), max(one[3], other[3])
