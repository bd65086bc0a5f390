"""The assistant that needs no model: it finds the best passages of a folder's documents and quotes them.

The documents are read and indexed when it is built; a file that changes later is seen after a restart. An
answer is the documents' own text with the file and headings above each passage, in the language it is
written in; only the few words around it follow the question's language, English or Vietnamese. `sources`
are the quoted files, relative to the folder, best first. Where nothing fits, the answer says so and what was
searched, and has no sources: it never makes anything up.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from app.assistants import Answer
from app.assistants.documents.folder import listed, own_documentation, read_folder
from app.assistants.documents.folding import accented_words, is_vietnamese
from app.assistants.documents.index import Hit, PassageIndex
from app.assistants.documents.passages import Passage, split_document
from app.assistants.documents.query import QUESTION_CHARACTERS_MAX, query
from app.chat import Message, NewMessage, new_uuid, utc_now

__all__ = ["DocumentsAssistant", "own_documentation"]

_PASSAGES_MAX = 3
_CANDIDATES_MAX = 30
# A passage that is far behind the best one rather hides the answer than adds to it.
_SHARE_OF_BEST_MIN = 0.5
_TOPICS_MAX = 3
_TOPIC_CHARACTERS_MAX = 60
# How many documents are looked at for them: each takes a search.
_TOPICS_TRIED_MAX = 12
# How much a passage gains that has all the question's accented words as they are written.
_ACCENTS_BONUS = 0.3

log = logging.getLogger("chat_sessions.assistants")


@dataclass(frozen=True, slots=True)
class _Phrases:
    found: str
    passage: str
    nothing: str
    no_files: str
    one_file: str
    files: str


_ENGLISH = _Phrases(
    found="This is what the documentation says:",
    passage="From {place}:",
    nothing="I found nothing about that. I looked for the words of your question in {files}."
    " Try other words, or ask about one thing at a time.",
    no_files="no files at all: there are no documents to search (see the setting DOCUMENTS_DIR)",
    one_file="one file: {names}",
    files="{count} files: {names}",
)
_VIETNAMESE = _Phrases(
    found="Tài liệu viết như sau:",
    passage="Trích từ {place}:",
    nothing="Tôi không tìm thấy thông tin nào về điều này. Tôi đã tìm các từ trong câu hỏi của bạn trong {files}."
    " Bạn hãy thử dùng từ khác, hoặc hỏi từng ý một.",
    no_files="0 tệp: không có tài liệu nào để tìm (xem cài đặt DOCUMENTS_DIR)",
    one_file="một tệp: {names}",
    files="{count} tệp: {names}",
)


class DocumentsAssistant:
    """Answers from the Markdown and text files below `root`, or of the entries of it that `only` names.

    Raises `StartRefused` where `root` can't be read.
    """

    def __init__(self, root: Path, *, only: Sequence[str] | None = None) -> None:
        texts = read_folder(root, only=only)
        self._files = tuple(texts)
        self._index = PassageIndex(
            passage for name, text in texts.items() for passage in split_document(name, text)
        )
        self.topics = tuple(islice(self._titles(), _TOPICS_MAX))
        if self._index.is_cut:
            log.warning("only the first %d passages of the documents can be found", self._index.size)
        log.info("%d passages of %d files can be asked about", self._index.size, len(self._files))

    async def answer(self, history: Sequence[Message]) -> Answer:
        return await asyncio.to_thread(self._answer, history)

    async def close(self) -> None:
        # In a thread: a search that nobody waits for any more may still hold the index.
        await asyncio.to_thread(self._index.close)

    def _answer(self, history: Sequence[Message]) -> Answer:
        question = history[-1].content[:QUESTION_CHARACTERS_MAX]
        phrases = _VIETNAMESE if is_vietnamese(question) else _ENGLISH
        passages = self._passages(history, question)
        if not passages:
            return Answer(text=phrases.nothing.format(files=self._searched(phrases)))
        quotes = [
            f"{phrases.passage.format(place=_place(passage))}\n\n{passage.text}" for passage in passages
        ]
        return Answer(
            text="\n\n".join([phrases.found, *quotes]),
            sources=tuple(dict.fromkeys(passage.file for passage in passages)),
        )

    def _passages(self, history: Sequence[Message], question: str) -> list[Passage]:
        wanted = query(history)
        hits = self._index.search(wanted.terms, concepts_min=wanted.concepts_min, limit=_CANDIDATES_MAX)
        if wanted.asks_for_more:
            hits = _not_yet_quoted(hits, history) or hits
        return _best(hits, question) if hits else []

    def _titles(self) -> Iterator[str]:
        """Of the documents that say most, as far as a question about one is answered from it."""
        passages = self._index.passages
        sizes = Counter(passage.file for passage in passages)
        titles = {passage.file: passage.headings[0] for passage in reversed(passages) if passage.headings}
        for file, _ in sizes.most_common(_TOPICS_TRIED_MAX):
            title = titles.get(file, "")
            if 0 < len(title) <= _TOPIC_CHARACTERS_MAX:
                asked = NewMessage(message_id=new_uuid(), role="user", content=title, created_at=utc_now())
                answer = self._passages([asked.at(1)], title)
                if answer and answer[0].file == file:
                    yield title

    def _searched(self, phrases: _Phrases) -> str:
        match self._files:
            case ():
                return phrases.no_files
            case (name,):
                return phrases.one_file.format(names=name)
        return phrases.files.format(count=len(self._files), names=listed(self._files))


def _best(hits: list[Hit], question: str) -> list[Passage]:
    accented = accented_words(question)
    scores: dict[Passage, float] = {}
    # Copies of a text are quoted once.
    for hit in {hit.passage.text: hit for hit in reversed(hits)}.values():
        share = len(accented & accented_words(hit.passage.text)) / len(accented) if accented else 0
        scores[hit.passage] = hit.score * (1 + _ACCENTS_BONUS * share)
    ranked = sorted(scores, key=lambda passage: -scores[passage])
    least = scores[ranked[0]] * _SHARE_OF_BEST_MIN
    return [passage for passage in ranked[:_PASSAGES_MAX] if scores[passage] >= least]


def _not_yet_quoted(hits: list[Hit], history: Sequence[Message]) -> list[Hit]:
    given = [message.content for message in history if message.role == "assistant"]
    return [hit for hit in hits if not any(hit.passage.text in answer for answer in given)]


def _place(passage: Passage) -> str:
    return f"{passage.file}, “{' › '.join(passage.headings)}”" if passage.headings else passage.file
