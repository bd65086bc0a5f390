"""What `ask` promises about any assistant, and what `load_assistant` refuses."""

import asyncio
import sys
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from app.assistants import ANSWER_BYTES_MAX, Answer, ask, load_assistant
from app.assistants.documents import DocumentsAssistant
from app.assistants.openai_compatible import OpenAICompatibleAssistant
from app.assistants.openai_compatible.backoff import retry_after_seconds, wait_seconds
from app.assistants.openai_compatible.conversation import chat_messages, newest_within
from app.chat import Message, new_uuid
from app.errors import AssistantFailed, AssistantTimedOut, SessionNotFound, StartRefused

pytestmark = pytest.mark.anyio


def message(content="How long?", *, role="user", seq=1):
    return Message(
        message_id=new_uuid(),
        role=role,
        content=content,
        created_at=datetime(2025, 1, 1, tzinfo=UTC),
        seq=seq,
    )


class Scripted:
    """Does in `answer` what the test says."""

    def __init__(self, act):
        self._act = act

    async def answer(self, history):
        return await self._act(history)

    async def close(self):
        """Nothing to close."""


def returning(answer):
    async def act(_):
        return answer

    return Scripted(act)


def raising(exc):
    async def act(_):
        raise exc

    return Scripted(act)


def waiting_forever(started=None):
    async def act(_):
        (started or asyncio.Event()).set()
        await asyncio.Event().wait()

    return Scripted(act)


async def test_the_answer_comes_back_with_its_sources():
    answer = Answer(text="An hour. Một giờ. 🕐", sources=("README.md", "tài liệu.md"))
    assert await ask(returning(answer), [message()], deadline_seconds=5) == answer


async def test_the_assistant_sees_the_whole_window_as_it_was_given():
    seen = []

    async def act(history):
        seen.extend(history)
        return Answer(text="yes")

    history = [message("a"), message("b", role="assistant", seq=2), message("c", seq=3)]
    await ask(Scripted(act), history, deadline_seconds=5)
    assert seen == history


async def test_a_list_of_sources_is_taken_as_a_tuple():
    answer = await ask(returning(Answer(text="yes", sources=["a.md"])), [message()], deadline_seconds=5)
    assert answer.sources == ("a.md",)


async def test_no_answer_by_the_deadline_is_a_timeout_that_names_it():
    with pytest.raises(AssistantTimedOut, match=r"within 0\.05 s"):
        await ask(waiting_forever(), [message()], deadline_seconds=0.05)


async def test_a_timeout_of_the_assistants_own_is_a_failure():
    with pytest.raises(AssistantFailed, match="TimeoutError: the database"):
        await ask(raising(TimeoutError("the database")), [message()], deadline_seconds=5)


async def test_an_answer_after_the_deadline_is_refused():
    async def act(_):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return Answer(text="late")

    with pytest.raises(AssistantTimedOut):
        await ask(Scripted(act), [message()], deadline_seconds=0.05)


async def test_an_error_while_the_deadline_cancels_is_a_timeout():
    async def act(_):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise RuntimeError("while cleaning up") from None

    with pytest.raises(AssistantTimedOut):
        await ask(Scripted(act), [message()], deadline_seconds=0.05)


async def test_cancelling_the_caller_passes_through():
    started = asyncio.Event()
    task = asyncio.create_task(ask(waiting_forever(started), [message()], deadline_seconds=30))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancellation_inside_the_assistant_does_not_cancel_the_caller():
    with pytest.raises(AssistantFailed, match="CancelledError"):
        await ask(raising(asyncio.CancelledError()), [message()], deadline_seconds=5)


async def test_an_exception_becomes_one_line_with_its_type_and_text():
    cause = ValueError("first line\nsecond line\x1b[31m")
    with pytest.raises(AssistantFailed) as caught:
        await ask(raising(cause), [message()], deadline_seconds=5)
    assert caught.value.detail == "the assistant failed: ValueError: first line second line [31m"
    assert caught.value.__cause__ is cause


async def test_an_assistant_that_exits_has_failed():
    with pytest.raises(AssistantFailed, match="SystemExit: no licence"):
        await ask(raising(SystemExit("no licence")), [message()], deadline_seconds=5)


async def test_a_long_error_text_is_cut():
    with pytest.raises(AssistantFailed) as caught:
        await ask(raising(ValueError("x" * 1_000_000)), [message()], deadline_seconds=5)
    assert len(caught.value.detail) < 300


async def test_an_error_text_with_a_lone_surrogate_can_be_sent():
    with pytest.raises(AssistantFailed) as caught:
        await ask(raising(ValueError("bad \ud800\0 text")), [message()], deadline_seconds=5)
    assert caught.value.detail.encode().decode() == "the assistant failed: ValueError: bad ? text"


@pytest.mark.parametrize("error", [AssistantFailed("said so"), AssistantTimedOut("said so")])
async def test_an_assistants_own_verdict_passes_through(error):
    with pytest.raises(type(error)) as caught:
        await ask(raising(error), [message()], deadline_seconds=5)
    assert caught.value is error


async def test_another_error_of_the_domain_does_not_pass_for_the_stores():
    with pytest.raises(AssistantFailed, match="SessionNotFound"):
        await ask(raising(SessionNotFound()), [message()], deadline_seconds=5)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, "returned NoneType"),
        ("text", "returned str"),
        (Answer(text=None), "a text of NoneType"),
        (Answer(text=""), "is empty"),
        (Answer(text=" \n\t"), "is empty"),
        (Answer(text="a\0b"), "answer contains NUL"),
        (Answer(text="a\ud800b"), "answer contains a lone surrogate"),
        (Answer(text="a", sources="a.md"), "sources are str"),
        (Answer(text="a", sources=None), "sources are NoneType"),
        (Answer(text="a", sources=("a.md", 7)), "sources hold int"),
        (Answer(text="a", sources=("a\0.md",)), "source contains NUL"),
        (Answer(text="a", sources=("\udcff.md",)), "source contains a lone surrogate"),
        (Answer(text="ế" * ANSWER_BYTES_MAX), "at most 262144"),
        (Answer(text="a", sources=("x" * 9_000,)), "at most 8192"),
    ],
)
async def test_an_answer_that_the_store_can_not_keep_is_a_failure_that_says_so(answer, said):
    with pytest.raises(AssistantFailed, match=said):
        await ask(returning(answer), [message()], deadline_seconds=5)


# Loading


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Writes a module that the test can name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source):
        (tmp_path / "own_assistant.py").write_text(source)
        monkeypatch.delitem(sys.modules, "own_assistant", raising=False)

    return write


async def test_documents_of_a_folder_are_loaded(tmp_path):
    (tmp_path / "a.md").write_text("# Owls\n\nOwls hunt at night.\n")
    assistant = load_assistant("documents", documents_dir=str(tmp_path))
    assert isinstance(assistant, DocumentsAssistant)
    answer = await ask(assistant, [message("When do owls hunt?")], deadline_seconds=5)
    assert answer.sources == ("a.md",)
    await assistant.close()


async def test_documents_without_a_folder_are_the_projects_own():
    assistant = load_assistant("documents")
    answer = await ask(assistant, [message("xyzzy plugh")], deadline_seconds=5)
    assert "README.md" in answer.text
    await assistant.close()


async def test_openai_is_loaded_without_asking_its_server():
    assistant = load_assistant("openai", openai_base_url="http://127.0.0.1:9/v1", openai_model="m")
    assert isinstance(assistant, OpenAICompatibleAssistant)
    await assistant.close()


async def test_a_factory_of_ones_own_is_called_and_its_assistant_answers(own_module):
    own_module(
        "from app.assistants import Answer\n"
        "class Echo:\n"
        "    async def answer(self, history): return Answer(text=history[-1].content)\n"
        "    async def close(self): pass\n"
        "class Makers:\n"
        "    make = staticmethod(Echo)\n"
    )
    assistant = load_assistant("own_assistant:Makers.make")
    assert (await ask(assistant, [message("hello")], deadline_seconds=5)).text == "hello"


@pytest.mark.parametrize("name", ["", "gpt", "documents:", ":factory", "a b:c", "a..b:c", "x:1"])
def test_a_name_that_is_no_assistant_is_refused_with_what_would_be(name):
    with pytest.raises(StartRefused, match=r"expected documents, openai, or package\.module:factory"):
        load_assistant(name)


@pytest.mark.parametrize(
    ("source", "name", "said"),
    [
        ("", "no_such_module_here:make", "ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("def (", "own_assistant:make", "importing own_assistant failed: SyntaxError"),
        ("1/0", "own_assistant:make", "importing own_assistant failed: ZeroDivisionError"),
        ("", "own_assistant:make", "own_assistant has no make"),
        ("make = 7", "own_assistant:make", "make is int, which can't be called"),
        ("def make(): return 1/0", "own_assistant:make", "calling make\\(\\) failed: ZeroDivisionError"),
        ("def make(key): pass", "own_assistant:make", "called without arguments"),
        ("async def make(): pass", "own_assistant:make", "make is an async function"),
        ("def make(): pass", "own_assistant:make", "returned NoneType without answer and close"),
        (
            "class make:\n    async def answer(self, history): pass",
            "own_assistant:make",
            "returned make without close",
        ),
    ],
)
def test_a_factory_that_gives_no_assistant_refuses_the_start_in_one_line(own_module, source, name, said):
    own_module(source)
    with pytest.raises(StartRefused, match=said) as caught:
        load_assistant(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"openai_base_url": None}, "OPENAI_BASE_URL is not set"),
        ({"openai_base_url": "localhost:11434/v1"}, "OPENAI_BASE_URL is 'localhost:11434/v1'"),
        ({"openai_base_url": "ftp://host/v1"}, "expected http://HOST:PORT/v1"),
        ({"openai_base_url": "http://"}, "expected http://HOST:PORT/v1"),
        ({"openai_base_url": "http://host:port/v1"}, "OPENAI_BASE_URL is"),
        ({"openai_base_url": "http://host:99999/v1"}, "OPENAI_BASE_URL is"),
        ({"openai_model": ""}, "OPENAI_MODEL is not set"),
    ],
)
def test_openai_settings_that_can_not_work_refuse_the_start_by_name(settings, said):
    given = {"openai_base_url": "http://127.0.0.1:9/v1", "openai_model": "m", **settings}
    with pytest.raises(StartRefused, match=said):
        load_assistant("openai", **given)


@pytest.mark.parametrize(
    "settings",
    [
        {"openai_base_url": "https://me:s3cret@host/v1"},
        {"openai_base_url": "http://me:s3cret#@host/v1"},
        {"openai_base_url": "me:s3cret@host/v1"},
        {"openai_api_key": "s3cret with a space"},
        {"openai_api_key": "s3cret\nX-Header: 1"},
        {"openai_api_key": "s3cret\u200b"},
    ],
)
def test_a_secret_that_can_not_be_sent_refuses_the_start_without_showing_it(settings):
    given = {"openai_base_url": "http://127.0.0.1:9/v1", "openai_model": "m", **settings}
    with pytest.raises(StartRefused) as caught:
        load_assistant("openai", **given)
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("missing", ["nowhere", "a\0b"])
def test_a_documents_dir_that_is_not_there_refuses_the_start(tmp_path, missing):
    with pytest.raises(StartRefused, match=r"DOCUMENTS_DIR is .*, which is not .*name a folder"):
        load_assistant("documents", documents_dir=f"{tmp_path}/{missing}")


def test_a_documents_dir_that_is_a_file_refuses_the_start():
    with pytest.raises(StartRefused, match="which is not a folder"):
        load_assistant("documents", documents_dir=Path(__file__))


# What is sent to an OpenAI-compatible server


def test_the_window_is_cut_to_the_newest_messages_that_fit():
    history = [message(text) for text in ("aaaa", "bbbb", "cccc", "dd")]
    assert [m.content for m in newest_within(history, 10)] == ["bbbb", "cccc", "dd"]
    assert [m.content for m in newest_within(history, 9)] == ["cccc", "dd"]


def test_the_question_is_sent_even_if_it_alone_is_over_the_budget():
    assert [m.content for m in newest_within([message("a"), message("bbbb")], 3)] == ["bbbb"]


def test_the_window_becomes_turns_that_every_server_accepts():
    history = [
        message("Hello, I am the assistant.", role="assistant"),
        message("one"),
        message("two"),
        message("Speak briefly.", role="system"),
        message("  ", role="assistant"),
        message("42 degrees", role="tool"),
        message("answer", role="assistant"),
        message("three"),
    ]
    assert chat_messages(history, "Be kind.") == [
        {"role": "system", "content": "Be kind.\n\nSpeak briefly."},
        {"role": "user", "content": "one\n\ntwo\n\n[output of a tool]\n42 degrees"},
        {"role": "assistant", "content": "answer"},
        {"role": "user", "content": "three"},
    ]


def test_without_instructions_there_is_no_system_message():
    assert chat_messages([message("hi")], None) == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "0"}, 0),
        ({"Retry-After": " 7 "}, 7),
        ({"Retry-After": "1.5"}, 1.5),
        ({"Retry-After": "-3"}, None),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "9" * 400}, None),
        ({"Retry-After": "Wed, 01 Jan 2020 00:00:00 GMT"}, 0),
        ({"Retry-After": "Wed, 01 Jan 2020 00:00:30 GMT", "Date": "Wed, 01 Jan 2020 00:00:00 GMT"}, 30),
        ({"Retry-After": "Wed, 01 Jan 2020 00:00:30 -0000", "Date": "nonsense"}, 0),
        ({"Retry-After": "Wed, 99 Jan 2020 00:00:00 GMT"}, None),
    ],
)
def test_retry_after_is_read_in_both_forms_and_nonsense_is_ignored(headers, seconds):
    assert retry_after_seconds(httpx.Headers(headers)) == seconds


@pytest.mark.parametrize(("attempt", "longest"), [(1, 0.5), (2, 1), (3, 2), (50, 8)])
def test_waits_grow_with_jitter_up_to_a_bound(attempt, longest):
    waits = [wait_seconds(attempt, None) for _ in range(200)]
    assert longest / 2 <= min(waits) < max(waits) <= longest


def test_what_the_server_asks_for_is_the_least_wait():
    assert min(wait_seconds(1, 20) for _ in range(200)) >= 20
