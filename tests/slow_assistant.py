"""An assistant for a service in another process: thinks until the test lets it answer.

In the folder SLOW_ASSISTANT_DIR it makes the file `asked` with a question, and answers once there is a file `answer`.
"""

import asyncio
import os
from pathlib import Path

from app.assistants import Answer


class SlowAssistant:
    def __init__(self):
        self._folder = Path(os.environ["SLOW_ASSISTANT_DIR"])

    async def answer(self, history):
        (self._folder / "asked").write_text(history[-1].content)
        while not (self._folder / "answer").exists():  # noqa: ASYNC110 - another process has no event of ours
            await asyncio.sleep(0.01)
        return Answer(text=f"Sau khi nghĩ: {history[-1].content}")

    async def close(self):
        pass
