"""Assistants that tests name as `tests.assistants_for_tests:NAME`; a test finds its own in `api.assistant`."""

import asyncio

from app.assistants import Answer


def described(history):
    """An answer that tells what the assistant was shown."""
    return Answer(
        text="heard: " + " | ".join(message.content for message in history), sources=("doc1", "doc2")
    )


class Echo:
    """Answers with everything that it was shown."""

    async def answer(self, history):
        return described(history)

    async def close(self):
        pass


class FailsOnce(Echo):
    """Fails the first time, answers every time after it."""

    def __init__(self):
        self.asked = 0

    async def answer(self, history):
        self.asked += 1
        if self.asked == 1:
            raise RuntimeError("the model is on fire")
        return described(history)


class NeverFirst(FailsOnce):
    """Never answers the first time."""

    async def answer(self, history):
        self.asked += 1
        if self.asked == 1:
            await asyncio.Event().wait()
        return described(history)


class Gated(Echo):
    """Thinks until its gate is opened; each question has a gate of its own."""

    def __init__(self):
        self._gates = []
        self._asked = asyncio.Condition()

    async def answer(self, history):
        gate = asyncio.Event()
        async with self._asked:
            self._gates.append(gate)
            self._asked.notify_all()
        await gate.wait()
        return described(history)

    async def asked(self, times):
        """Returns once that many questions have been asked."""
        async with asyncio.timeout(10), self._asked:
            await self._asked.wait_for(lambda: len(self._gates) >= times)

    def open(self, index):
        self._gates[index].set()

    def open_all(self):
        for gate in self._gates:
            gate.set()


class Suggests(Echo):
    """Can be asked about more than a page has room for."""

    topics = (1, "one", "<b>two</b>", "three" * 15, "four")


class TooLong(Echo):
    """Says more than a message may hold."""

    async def answer(self, history):
        return Answer(text="a" * (256 * 1024 + 1))


echo = Echo
fails_once = FailsOnce
never_first = NeverFirst
gated = Gated
suggests = Suggests
too_long = TooLong
