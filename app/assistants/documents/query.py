"""What to look for, from a question and the turns before it.

A question's content words are its concepts; a passage must have a third of them to be an answer, so that a
stray word does not make one. Earlier questions join at a lower weight, the older the lower:

- A question of more than two concepts that does not refer back ("it", "that", "nó") stands alone: earlier
  words would only pull the answer towards the last topic.
- A shorter one is ranked with the earlier words, too, but has to match with a word of its own: a new
  topic with no answer gets none, not the old topic's.
- One that refers back with a single concept ("how do I change it?") is about the earlier words: they count
  nearly as much, and a passage with them alone is an answer.
- One without words of its own ("tell me more") is answered from the earlier words, with what was not
  quoted yet.

Everything is bounded: a question of a megabyte costs what its first 10,000 characters cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from app.assistants.documents.folding import accented_words, words
from app.assistants.documents.index import Term
from app.chat import Message

QUESTION_CHARACTERS_MAX = 10_000
CONCEPTS_MAX = 24
EARLIER_CONCEPTS_MAX = 8

_EARLIER_WEIGHTS = (0.4, 0.2, 0.1)
_LEANING_WEIGHTS = (0.8, 0.3, 0.1)
_RELATED_WEIGHT = 0.5
_PAIR_WEIGHT = 0.5
_STANDS_ALONE_ABOVE = 2
_CONCEPTS_MIN_MAX = 3

# Folded, as the words are; few, because BM25 itself gives little for a frequent word.
_STOP = frozenset(
    word
    for line in (
        "a about again also an and any are as at be by can could did do does else explain for from give happen",
        "happens have has how i if in is it its just me more my of on one or other please show so tell than",
        "thanks that the their them then there these they this those to us use want was we",
        "what when where which who why will with would you your",
        # Vietnamese
        "ai ban bao bi biet cac cach cai can cho co cua da dau day de di do duoc gi giai hay hon khi khong la",
        "lam lau le len ma minh mot nao nay neu nhieu nhu nhung no noi nua o ra ro sao se tai the them thi",
        "thich toi tren trong tu va vay ve vi voi",
    )
    for word in line.split()
)
_REFERS_BACK = frozenset({"it", "its", "that", "this", "these", "those", "they", "them", "more", "else"})
# With their accents: without them they are everyday English words ("do", "no", "the").
_REFERS_BACK_VIETNAMESE = frozenset({"đó", "nó", "này", "vậy", "thế", "nữa", "thêm", "hơn", "tiếp"})

# Other words for what this project is asked most, and the Vietnamese ones for its English documentation.
# In documents about something else they are rare, and weigh half.
_RELATED: dict[tuple[str, ...], tuple[str, ...]] = {
    ("how", "long"): ("ttl", "expire", "lifetime", "retention", "seconds"),
    ("live",): ("ttl", "expire", "lifetime"),
    ("lifetime",): ("ttl", "expire", "live"),
    ("expire",): ("ttl", "expiry", "lifetime"),
    ("ttl",): ("expire", "expiry", "lifetime"),
    ("delete",): ("erase", "remove"),
    ("remove",): ("delete", "erase"),
    ("store",): ("storage", "postgresql", "redis", "durable"),
    ("save",): ("store", "durable"),
    ("start",): ("run", "serve", "quickstart"),
    ("install",): ("run", "requirements", "quickstart"),
    ("configure",): ("settings", "environment"),
    ("config",): ("settings", "environment"),
    ("down",): ("outage", "unreachable", "degraded", "unavailable"),
    ("outage",): ("down", "unreachable", "degraded", "unavailable"),
    ("postgres",): ("postgresql",),
    ("bao", "lau"): ("ttl", "expire", "lifetime", "seconds"),
    ("het", "han"): ("ttl", "expire", "expiry"),
    ("ton", "tai"): ("ttl", "live", "lifetime"),
    ("phien",): ("session",),
    ("tin", "nhan"): ("message",),
    ("lich", "su"): ("history",),
    ("luu", "tru"): ("storage", "store", "postgresql", "redis"),
    ("cai", "dat"): ("settings", "run", "install"),
    ("cau", "hinh"): ("settings", "environment"),
    ("khoi", "dong"): ("start", "run", "serve"),
    ("xoa",): ("delete", "erase"),
    ("loi",): ("error", "troubleshooting"),
}


@dataclass(frozen=True, slots=True)
class Query:
    """A passage must have `concepts_min` of the question's own concepts. `asks_for_more`: there are none."""

    terms: tuple[Term, ...]
    concepts_min: int
    asks_for_more: bool = False


def query(history: Sequence[Message]) -> Query:
    """What to look for (see the module); without terms where the question names nothing."""
    text = history[-1].content[:QUESTION_CHARACTERS_MAX]
    own = _concepts(text, CONCEPTS_MAX)
    terms = [
        *(Term(phrase, weight, number) for number, concept in enumerate(own) for phrase, weight in concept),
        *_pairs(own),
    ]
    refers_back = _refers_back(text)
    leans = not own or (refers_back and len(own) == 1)
    if refers_back or len(own) <= _STANDS_ALONE_ABOVE:
        terms += _earlier_terms(history[:-1], _LEANING_WEIGHTS if leans else _EARLIER_WEIGHTS)
    concepts_min = 0 if leans else min(_CONCEPTS_MIN_MAX, -(-len(own) // 3))
    return Query(tuple(terms), concepts_min, asks_for_more=not own)


def _refers_back(text: str) -> bool:
    return not (
        _REFERS_BACK.isdisjoint(words(text)) and _REFERS_BACK_VIETNAMESE.isdisjoint(accented_words(text))
    )


_Concept = list[tuple[tuple[str, ...], float]]


def _concepts(text: str, limit: int) -> list[_Concept]:
    """Each thing that the text names, as the phrases that say it, its own first."""
    found: dict[tuple[str, ...], _Concept] = {}
    sequence = words(text)
    at = 0
    while at < len(sequence) and len(found) < limit:
        pair = tuple(sequence[at : at + 2])
        own = pair if pair in _RELATED else pair[:1]
        at += len(own)
        if own in found or (len(own) == 1 and own[0] in _STOP):
            continue
        related = _RELATED.get(own) or _RELATED.get(_singular(own)) or ()
        found[own] = [(own, 1.0), *(((word,), _RELATED_WEIGHT) for word in related)]
    return list(found.values())


def _singular(own: tuple[str, ...]) -> tuple[str, ...]:
    return (own[0].removesuffix("s").removesuffix("d"),)


def _pairs(concepts: list[_Concept]) -> list[Term]:
    """Neighbours as one phrase: most Vietnamese words are two syllables, each of which means much else."""
    return [Term(a[0][0] + b[0][0], _PAIR_WEIGHT) for a, b in pairwise(concepts)]


def _earlier_terms(history: Sequence[Message], weights: Sequence[float]) -> list[Term]:
    questions = [message.content for message in reversed(history) if message.role == "user"]
    terms: dict[tuple[str, ...], Term] = {}
    for text, weight in zip(questions, weights, strict=False):
        for concept in _concepts(text[:QUESTION_CHARACTERS_MAX], EARLIER_CONCEPTS_MAX):
            for phrase, phrase_weight in concept:
                terms.setdefault(phrase, Term(phrase, weight * phrase_weight))
    return list(terms.values())
