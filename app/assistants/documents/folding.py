"""Words as the index and the questions both see them: without accents and without case.

Vietnamese is typed with accents, without them, and in both Unicode forms. FTS5's own folding leaves `đ`
alone, so text is folded here, before it is indexed and before it is searched.
"""

import re
import unicodedata

# The blocks of combining marks, and the points of Hebrew and Arabic: as a pattern because asking
# `unicodedata.combining` letter by letter is ten times slower.
_MARKS = re.compile(
    "[\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u064b-\u065f\u0670"
    "\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]+"
)
# Old converters write the Icelandic eth for the Vietnamese d with a stroke; they look alike in capitals.
_STROKES = str.maketrans("đð", "dd")
# FTS5's tokenizer cuts at underscores, too: SESSION_TTL_SECONDS is three words.
_WORD = re.compile(r"[^\W_]+")
# Letters that no other language with Latin letters in wide use has.
_VIETNAMESE = re.compile(r"[đăơưĩũạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ]")
# Words whose letters other languages have as well, but not these words.
_VIETNAMESE_WORDS = frozenset({"gì", "tôi", "và", "thì", "có", "không", "phiên", "các"})

WORD_CHARACTERS_MAX = 64


def fold(text: str) -> str:
    if text.isascii():
        return text.lower()
    return _MARKS.sub("", unicodedata.normalize("NFD", text)).casefold().translate(_STROKES)


def words(text: str) -> list[str]:
    """The folded words of a text, in order. None holds anything but letters and digits."""
    return [word[:WORD_CHARACTERS_MAX] for word in _WORD.findall(fold(text))]


def accented_words(text: str) -> frozenset[str]:
    """The words that have accents, with them, in one Unicode form."""
    composed = unicodedata.normalize("NFC", text).casefold()
    return frozenset(word for word in _WORD.findall(composed) if fold(word) != word)


def is_vietnamese(text: str) -> bool:
    composed = unicodedata.normalize("NFC", text).casefold()
    return bool(_VIETNAMESE.search(composed)) or not _VIETNAMESE_WORDS.isdisjoint(_WORD.findall(composed))
