"""How a process that serves ends."""

import asyncio
import os
import signal

import pytest

from app.cli.worker import ended_by_sigterm

pytestmark = pytest.mark.anyio


async def test_a_sigterm_is_raised_where_the_process_waits_and_in_no_callback():
    """A callback of a connection that was being opened logged the SystemExit as a fatal error of its transport."""
    went_on = []

    def callback():
        os.kill(os.getpid(), signal.SIGTERM)
        went_on.append("callback")

    handler = signal.getsignal(signal.SIGTERM)
    with ended_by_sigterm():
        asyncio.get_running_loop().call_soon(callback)
        await asyncio.sleep(20)
        went_on.append("block")

    assert went_on == ["callback"]
    assert signal.getsignal(signal.SIGTERM) is handler


async def test_another_cancellation_is_not_taken_for_a_sigterm():
    async def wait():
        with ended_by_sigterm():
            await asyncio.sleep(20)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
