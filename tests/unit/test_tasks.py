"""`app.tasks`: tasks end when they are told to, and leave nothing behind."""

import asyncio
from contextlib import suppress

import pytest

from app.tasks import all_of, heed_cancellation, stop

pytestmark = pytest.mark.anyio


async def sleeper(ended: list[str]) -> str:
    try:
        await asyncio.sleep(60)
    finally:
        ended.append("ended")
    return "slept"


async def says(word: str) -> str:
    await asyncio.sleep(0)
    return word


async def fails() -> str:
    await asyncio.sleep(0.01)
    raise ValueError("no")


async def test_what_all_say_is_returned_in_their_order() -> None:
    assert await all_of([says("a"), says("b")]) == ["a", "b"]
    assert await all_of([]) == []


async def test_the_first_error_ends_the_others_and_is_raised_when_they_have_ended() -> None:
    ended: list[str] = []

    with pytest.raises(ValueError, match="no"):
        await all_of([sleeper(ended), fails(), sleeper(ended)])

    assert ended == ["ended", "ended"]


async def test_a_failure_is_not_counted_as_a_cancellation() -> None:
    async def worker() -> int:
        for _ in range(2):
            with suppress(ValueError):
                await all_of([fails(), says("a")])
        heed_cancellation()
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling()

    assert await asyncio.create_task(worker()) == 0


async def test_a_cancellation_of_the_caller_ends_all() -> None:
    ended: list[str] = []
    calling = asyncio.create_task(all_of([sleeper(ended), sleeper(ended)]))
    await asyncio.sleep(0.01)

    calling.cancel()

    with pytest.raises(asyncio.CancelledError):
        await calling
    assert ended == ["ended", "ended"]


async def test_a_task_that_loses_a_request_to_stop_is_asked_again() -> None:
    async def deaf_once() -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        await asyncio.sleep(60)

    task = asyncio.create_task(deaf_once())
    await asyncio.sleep(0)

    await stop(task)

    assert task.cancelled()


async def test_a_lost_request_to_stop_is_heeded() -> None:
    async def deaf_then_heeding() -> str:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        heed_cancellation()
        return "went on"

    task = asyncio.create_task(deaf_then_heeding())
    await asyncio.sleep(0)

    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
