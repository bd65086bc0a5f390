"""Who answers: a session's window goes in, a text with its sources comes out.

Guarantees of `ask`, whoever the assistant is:

- It ends by the deadline with an answer that the store can keep, or with `AssistantFailed` or
  `AssistantTimedOut`. An assistant that blocks the event loop, or that refuses to be cancelled, can hold it
  up: that is its bug, and its late answer is refused.
- Cancelling the caller cancels the assistant; the cancellation passes through.
- An error's text has one short line of the cause and never a traceback.

No connection and no lock is held in here: the caller has stored the user's message before it asks.
"""

import asyncio
import importlib
import inspect
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol

from app.chat import Message
from app.errors import AssistantFailed, AssistantTimedOut, StartRefused

#: A message's content in the store.
ANSWER_BYTES_MAX = 256 * 1024
#: The sources stand in the message's metadata, which has 16 KiB: the half is left to other fields.
SOURCES_BYTES_MAX = 8 * 1024

_LINE_CHARACTERS_MAX = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """`sources` are file names, URLs, or whatever else names what the text rests on; best first."""

    text: str
    sources: tuple[str, ...] = ()


class Assistant(Protocol):
    async def answer(self, history: Sequence[Message]) -> Answer:
        """Answers the last message of `history`, the session's window, oldest first.

        Called concurrently, for many sessions. Any exception means that there is no answer.
        """
        ...

    async def close(self) -> None:
        """Lets go of everything. Called once, after the last answer."""
        ...


def topics_of(assistant: Assistant) -> tuple[str, ...]:
    """What it can be asked about, a few words each: its optional attribute `topics`, as far as that is a list of texts."""
    topics = getattr(assistant, "topics", ())
    return (
        tuple(topic for topic in topics if isinstance(topic, str)) if isinstance(topics, list | tuple) else ()
    )


async def ask(
    assistant: Assistant,
    history: Sequence[Message],
    *,
    deadline_seconds: float,
    answer_bytes_max: int = ANSWER_BYTES_MAX,
) -> Answer:
    """The assistant's answer, or `AssistantFailed`, or `AssistantTimedOut` (see the module)."""
    deadline = asyncio.timeout(deadline_seconds)
    try:
        async with deadline:
            answer: object = await assistant.answer(history)
    except asyncio.CancelledError as exc:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # The assistant awaited something of its own that was cancelled: nobody cancelled this request.
        raise AssistantFailed(f"the assistant failed: {described(exc)}") from exc
    # A library that gives up by sys.exit() must not end the service.
    except (Exception, SystemExit) as exc:
        if deadline.expired():
            raise _timed_out(deadline_seconds) from exc
        if isinstance(exc, AssistantFailed | AssistantTimedOut):
            raise
        raise AssistantFailed(f"the assistant failed: {described(exc)}") from exc
    if deadline.expired():
        raise _timed_out(deadline_seconds)
    return _storable(answer, answer_bytes_max)


def _timed_out(deadline_seconds: float) -> AssistantTimedOut:
    return AssistantTimedOut(f"the assistant did not answer within {deadline_seconds:g} s")


def _storable(answer: object, answer_bytes_max: int) -> Answer:
    if not isinstance(answer, Answer):
        raise AssistantFailed(f"the assistant returned {type(answer).__name__}, expected Answer")
    text, sources = _checked_text(answer.text), _checked_sources(answer.sources)
    if not text.strip():
        raise AssistantFailed("the assistant's answer is empty")
    if (size := len(text.encode())) > answer_bytes_max:
        raise AssistantFailed(f"the assistant's answer has {size} bytes, at most {answer_bytes_max} are kept")
    if (size := sources_size(sources)) > SOURCES_BYTES_MAX:
        raise AssistantFailed(f"the answer's sources have {size} bytes, at most {SOURCES_BYTES_MAX} are kept")
    return Answer(text=text, sources=sources)


def _checked_text(text: object) -> str:
    if not isinstance(text, str):
        raise AssistantFailed(f"the assistant's answer has a text of {type(text).__name__}, expected str")
    _refuse_unstorable(text, "answer")
    return text


def _checked_sources(sources: object) -> tuple[str, ...]:
    if not isinstance(sources, tuple | list):
        raise AssistantFailed(f"the answer's sources are {type(sources).__name__}, expected a tuple of str")
    for source in sources:
        if not isinstance(source, str):
            raise AssistantFailed(f"the answer's sources hold {type(source).__name__}, expected str")
        _refuse_unstorable(source, "source")
    return tuple(sources)


def _refuse_unstorable(text: str, what: str) -> None:
    if "\0" in text:
        raise AssistantFailed(f"the assistant's {what} contains NUL, which PostgreSQL can't store")
    if storable_text(text) != text:
        raise AssistantFailed(f"the assistant's {what} contains a lone surrogate, which is not Unicode text")


def sources_size(sources: Sequence[str]) -> int:
    """The sources' bytes as the store keeps them."""
    return len(json.dumps(sources, ensure_ascii=False).encode(errors="replace"))


def storable_text(text: str) -> str:
    """The text without NUL, and with a replacement for each lone surrogate."""
    return text.replace("\0", "").encode(errors="replace").decode()


def one_line(text: str) -> str:
    """The text as a short line for a message or a log: no line breaks, no control characters."""
    # Cut before the work too: an error's text may be a whole page.
    printable = "".join(
        c if c.isprintable() else " " for c in storable_text(text[: 8 * _LINE_CHARACTERS_MAX])
    )
    line = " ".join(printable.split())
    return line if len(line) <= _LINE_CHARACTERS_MAX else line[: _LINE_CHARACTERS_MAX - 1] + "…"


def described(exc: BaseException) -> str:
    """An exception in one short line: its type and its text."""
    text = one_line(str(exc))
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__


def load_assistant(
    name: str,
    *,
    documents_dir: str | os.PathLike[str] | None = None,
    openai_base_url: str | None = None,
    openai_api_key: str | None = None,
    openai_model: str | None = None,
    openai_system_prompt: str | None = None,
    openai_history_characters_max: int = 60_000,
    openai_retries_max: int = 2,
    deadline_seconds: float = 60,
) -> Assistant:
    """Builds the assistant that the setting ASSISTANT names, or refuses the start and says why.

    `documents` reads its files here; nothing is asked of a server before the first question.
    """
    # Imported where they are wanted: httpx is a third of a worker's start, and both import this module.
    if name == "documents":
        from app.assistants.documents import DocumentsAssistant, own_documentation  # noqa: PLC0415 - see above

        if documents_dir:
            return DocumentsAssistant(Path(documents_dir))
        root, only = own_documentation()
        return DocumentsAssistant(root, only=only)
    if name == "openai":
        from app.assistants.openai_compatible import OpenAICompatibleAssistant  # noqa: PLC0415 - see above

        return OpenAICompatibleAssistant(
            base_url=openai_base_url,
            model=openai_model,
            api_key=openai_api_key,
            system_prompt=openai_system_prompt,
            history_characters_max=openai_history_characters_max,
            retries_max=openai_retries_max,
            deadline_seconds=deadline_seconds,
        )
    module_name, colon, path = name.partition(":")
    if not (colon and _dotted(module_name) and _dotted(path)):
        raise StartRefused(
            f"ASSISTANT is {name!r}", hint="expected documents, openai, or package.module:factory"
        )
    return _made_by(name, module_name, path)


def _dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def _made_by(name: str, module_name: str, path: str) -> Assistant:
    try:
        module = importlib.import_module(module_name)
    except Exception as exc:
        raise StartRefused(
            f"ASSISTANT is {name!r}, and importing {module_name} failed: {described(exc)}",
            hint="install the package, or put its folder on PYTHONPATH",
        ) from exc
    try:
        factory = attrgetter(path)(module)
    except AttributeError as exc:
        raise StartRefused(
            f"ASSISTANT is {name!r}, and {module_name} has no {path}",
            hint="name a function or a class of that module",
        ) from exc
    if not callable(factory):
        raise StartRefused(
            f"ASSISTANT is {name!r}, and {path} is {type(factory).__name__}, which can't be called",
            hint="name a function or a class; it is called without arguments",
        )
    try:
        assistant: Any = factory()
    except StartRefused:
        raise
    except Exception as exc:
        raise StartRefused(
            f"ASSISTANT is {name!r}, and calling {path}() failed: {described(exc)}",
            hint="it is called without arguments and must return the assistant",
        ) from exc
    if inspect.iscoroutine(assistant):
        assistant.close()
        raise StartRefused(
            f"ASSISTANT is {name!r}, and {path} is an async function",
            hint="make it a plain function that returns the assistant",
        )
    missing = [method for method in ("answer", "close") if not callable(getattr(assistant, method, None))]
    if missing:
        raise StartRefused(
            f"ASSISTANT is {name!r}, and {path}() returned {type(assistant).__name__}"
            f" without {' and '.join(missing)}",
            hint="expected an object with `async answer(history)` and `async close()`: app.assistants.Assistant",
        )
    loaded: Assistant = assistant
    return loaded
