"""Tasks that end when they are told to, and leave nothing behind: what Python 3.11 and 3.12 get wrong there."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

_T = TypeVar("_T")

_STOP_AGAIN_SECONDS = 0.5


async def stop(*tasks: asyncio.Task[Any]) -> None:
    """Ends tasks, and waits until they have. More than one request may be needed: up to Python 3.11
    `asyncio.wait_for`, which drivers use, swallows a cancellation that comes as its result does.
    """
    while left := [task for task in tasks if not task.done()]:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=_STOP_AGAIN_SECONDS)


async def all_of(calls: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Runs `calls` at the same time. The first error ends the others, and is raised when they have ended.

    Not `asyncio.TaskGroup`: up to Python 3.12 a group that failed while it was waited for leaves a cancellation
    counted on the task around it, which from then on looks like one that was asked to stop.
    """
    tasks = [asyncio.create_task(call) for call in calls]
    if not tasks:
        return []
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        await stop(*tasks)
    for task in tasks:
        if task in done:
            task.result()
    return [task.result() for task in tasks]


def heed_cancellation() -> None:
    """Raises `CancelledError` where the task was asked to stop and the request was swallowed on its way (`stop`)."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
