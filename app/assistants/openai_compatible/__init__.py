"""The assistant behind an OpenAI-compatible server: vLLM, Ollama, llama.cpp, OpenAI, a gateway.

- One question is one `POST {base_url}/chat/completions`, sent again at most `retries_max` times, and only
  where a repetition is harmless and can help: the connection broke, or the status says "later". A server
  that does not answer in time is not asked again: it is still computing the first answer.
- No wait goes past the deadline: a `Retry-After` that would is an error at once.
- Redirects are not followed: the key and the conversation go to the host that was set, or nowhere.
- The API key stands in the request's header only, never in an error's text or in a log.
- Everything read is bounded, and what the server sends is checked before it is an answer.
"""

import asyncio
import json
import logging
from collections.abc import Sequence
from typing import Any

import httpx

from app.assistants import SOURCES_BYTES_MAX, Answer, described, one_line, sources_size, storable_text
from app.assistants.openai_compatible.backoff import RETRIED_STATUSES, retry_after_seconds, wait_seconds
from app.assistants.openai_compatible.conversation import chat_messages, newest_within
from app.chat import Message
from app.errors import AssistantFailed, AssistantTimedOut, StartRefused

RESPONSE_BYTES_MAX = 4 * 1024 * 1024
CONNECTIONS_MAX = 100

_HINTS = {
    401: "check OPENAI_API_KEY",
    403: "check OPENAI_API_KEY",
    404: "check OPENAI_BASE_URL and OPENAI_MODEL",
}

_PORT_MAX = 65_535

log = logging.getLogger("chat_sessions.assistants")


class OpenAICompatibleAssistant:
    """`history_characters_max` bounds what is sent of the window, newest first; the question always is.

    `deadline_seconds` is the deadline of `app.assistants.ask`: waits are planned with it.
    Raises `StartRefused` for settings that can't work.
    """

    def __init__(
        self,
        *,
        base_url: str | None,
        model: str | None,
        api_key: str | None = None,
        system_prompt: str | None = None,
        history_characters_max: int = 60_000,
        retries_max: int = 2,
        deadline_seconds: float = 60,
        connect_timeout_seconds: float = 5,
        read_timeout_seconds: float | None = None,
    ) -> None:
        self._url = _checked_url(base_url)
        # Without the query, where some gateways keep a key.
        self._shown_url = str(self._url.copy_with(query=None))
        if not model:
            raise StartRefused("OPENAI_MODEL is not set", hint="name a model that the server has")
        self._model = model
        self._api_key = _checked_key(api_key)
        self._system_prompt = system_prompt
        self._history_characters_max = history_characters_max
        self._retries_max = retries_max
        self._deadline_seconds = deadline_seconds
        self._read_timeout_seconds = read_timeout_seconds or deadline_seconds
        self._client = httpx.AsyncClient(
            # Not compressed: what is read can't grow when it is unpacked.
            headers={"Accept": "application/json", "Accept-Encoding": "identity"}
            | ({"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}),
            timeout=httpx.Timeout(
                self._read_timeout_seconds, connect=connect_timeout_seconds, pool=connect_timeout_seconds
            ),
            limits=httpx.Limits(max_connections=CONNECTIONS_MAX, max_keepalive_connections=20),
            follow_redirects=False,
        )

    async def answer(self, history: Sequence[Message]) -> Answer:
        ends_at = asyncio.get_running_loop().time() + self._deadline_seconds
        window = newest_within(history, self._history_characters_max)
        body = {
            "model": self._model,
            "messages": chat_messages(window, self._system_prompt),
            "stream": False,
        }
        attempt = 1
        while True:
            try:
                response, content = await self._post(body)
            except httpx.TransportError as exc:
                failure = self._unreached(exc)
                failure.__cause__ = exc
                if isinstance(exc, httpx.ReadTimeout | httpx.WriteTimeout | httpx.PoolTimeout):
                    raise failure from exc
                asked = None
            else:
                if response.is_success:
                    return self._parsed(content)
                failure = self._refused(response, content)
                if response.status_code not in RETRIED_STATUSES:
                    raise failure
                asked = retry_after_seconds(response.headers)
            if attempt > self._retries_max:
                raise failure
            await self._wait(wait_seconds(attempt, asked), ends_at, failure)
            attempt += 1

    async def close(self) -> None:
        await self._client.aclose()

    async def _post(self, body: dict[str, Any]) -> tuple[httpx.Response, bytes]:
        async with self._client.stream("POST", self._url, json=body) as response:
            content = bytearray()
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > RESPONSE_BYTES_MAX:
                    raise AssistantFailed(
                        f"{self._shown_url} sent more than {RESPONSE_BYTES_MAX} bytes: not read further"
                    )
        return response, bytes(content)

    async def _wait(
        self, seconds: float, ends_at: float, failure: AssistantFailed | AssistantTimedOut
    ) -> None:
        left = ends_at - asyncio.get_running_loop().time()
        if seconds >= left:
            raise type(failure)(
                f"{failure.detail}; to be tried again in {seconds:.0f} s, with {left:.0f} s left to answer",
                hint=failure.hint,
            ) from failure
        log.info("%s; trying again in %.1f s", failure.detail, seconds)
        await asyncio.sleep(seconds)

    def _unreached(self, exc: httpx.TransportError) -> AssistantFailed | AssistantTimedOut:
        match exc:
            case httpx.ReadTimeout() | httpx.WriteTimeout():
                return AssistantTimedOut(
                    f"{self._shown_url} did not answer within {self._read_timeout_seconds:g} s"
                )
            case httpx.PoolTimeout():
                return AssistantFailed(f"{CONNECTIONS_MAX} questions to {self._shown_url} are under way")
        return AssistantFailed(
            f"{self._shown_url} can't be reached: {self._without_key(described(exc))}",
            hint="check OPENAI_BASE_URL, and that the server runs",
        )

    def _refused(self, response: httpx.Response, content: bytes) -> AssistantFailed:
        status = response.status_code
        if response.has_redirect_location:
            target = httpx.URL(response.headers["location"])
            return AssistantFailed(
                f"{self._shown_url} redirects to {target.host or 'another path'}, which is not followed",
                hint="set OPENAI_BASE_URL to where the server is",
            )
        said = self._said(content)
        return AssistantFailed(
            f"{self._shown_url} answered {status}{': ' if said else ''}{said}", hint=_HINTS.get(status)
        )

    def _said(self, content: bytes) -> str:
        """The server's own words for an error, in short."""
        text = content.decode(errors="replace")
        try:
            said: Any = json.loads(text)
        except (ValueError, RecursionError):
            said = text
        for name in ("error", "message", "detail"):
            if isinstance(said, dict) and name in said:
                said = said[name]
        return one_line(self._without_key(said if isinstance(said, str) else json.dumps(said)))

    def _without_key(self, text: str) -> str:
        return text.replace(self._api_key, "[the API key]") if self._api_key else text

    def _parsed(self, content: bytes) -> Answer:
        try:
            body: Any = json.loads(content)
        except (ValueError, RecursionError) as exc:
            raise AssistantFailed(
                f"{self._shown_url} sent something that is not JSON: {self._said(content[:1_000])}"
            ) from exc
        match body:
            case {"choices": [{"message": {"content": parts}}, *_]} if text := _text(parts):
                return Answer(text=storable_text(text), sources=_sources(body))
            case {"choices": [{"message": {"refusal": str(refusal)}}, *_]} if refusal:
                raise AssistantFailed(f"the model declined: {one_line(self._without_key(refusal))}")
            case {"choices": [{"message": dict(), "finish_reason": str(reason)}, *_]}:
                raise AssistantFailed(f"the model's answer is empty (finish_reason: {one_line(reason)})")
            case {"choices": [{"message": dict()}, *_]}:
                raise AssistantFailed("the model's answer is empty")
            case {"choices": []}:
                raise AssistantFailed(f"{self._shown_url} sent no choices")
            case {"error": _}:
                raise AssistantFailed(f"{self._shown_url} answered: {self._said(content)}")
        raise AssistantFailed(
            f"{self._shown_url} sent JSON that is no chat completion: {self._said(content)}"
        )


def _text(content: object) -> str:
    """The text of a message's content, which some servers send in parts."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "".join(text for text in texts if isinstance(text, str)).strip()


def _sources(body: dict[str, Any]) -> tuple[str, ...]:
    """As many of the citations as fit, where the server gives a list of strings."""
    found = body.get("citations") or body.get("sources")
    if not isinstance(found, list) or not all(isinstance(source, str) for source in found):
        return ()
    sources: list[str] = []
    for source in dict.fromkeys(map(storable_text, found)):
        if sources_size([*sources, source]) > SOURCES_BYTES_MAX:
            break
        sources.append(source)
    return tuple(sources)


def _checked_url(base_url: str | None) -> httpx.URL:
    expected = "expected http://HOST:PORT/v1 or https://HOST/v1"
    if not base_url:
        raise StartRefused("OPENAI_BASE_URL is not set", hint=expected)
    if "@" in base_url:
        # Not shown: it is a password, and httpx would log it with every request.
        raise StartRefused("OPENAI_BASE_URL holds a user or a password", hint="set OPENAI_API_KEY instead")
    try:
        url = httpx.URL(base_url.strip())
    except httpx.InvalidURL as exc:
        raise StartRefused(f"OPENAI_BASE_URL is {base_url!r}: {exc}", hint=expected) from exc
    if (
        url.scheme not in {"http", "https"}
        or not url.host
        or not 0 < (80 if url.port is None else url.port) <= _PORT_MAX
    ):
        raise StartRefused(f"OPENAI_BASE_URL is {base_url!r}", hint=expected)
    return url.copy_with(path=url.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions")


def _checked_key(api_key: str | None) -> str:
    key = (api_key or "").strip()
    # A header can't hold anything else, and the error that says so would show the key.
    if not key.isascii() or not key.isprintable() or " " in key:
        raise StartRefused(
            "OPENAI_API_KEY holds a character that no key has (a space, a line break, or not ASCII)",
            hint="copy it again; its value is not shown here",
        )
    return key
