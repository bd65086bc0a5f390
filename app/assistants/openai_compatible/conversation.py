"""A session's window as the messages of a chat completion.

The strictest servers set the form, so that one form suits all of them: chat templates of common models
refuse a system message that is not the first, two messages of one role in a row (a session has them where an
answer failed), and a conversation that begins with the assistant. And a `tool` message needs a tool call
before it, which a session does not record. So:

- the set prompt and the window's system messages become one system message at the front;
- a tool's message is the user's, with a line that says so: its text may be anybody's, and a system message
  would give it the operator's authority;
- neighbours of one role are joined, messages of white space only and an assistant's opening are left out.
"""

from collections.abc import Sequence

from app.chat import Message

_ROLES = {"user": "user", "assistant": "assistant", "tool": "user"}


def newest_within(history: Sequence[Message], characters_max: int) -> Sequence[Message]:
    """The newest messages whose contents fit, without gaps. The last one, the question, is always there."""
    characters = len(history[-1].content)
    start = len(history) - 1
    while start > 0 and characters + len(history[start - 1].content) <= characters_max:
        start -= 1
        characters += len(history[start].content)
    return history[start:]


def chat_messages(history: Sequence[Message], system_prompt: str | None) -> list[dict[str, str]]:
    """The messages to send (see the module)."""
    system = [system_prompt or "", *(m.content for m in history if m.role == "system")]
    turns: list[tuple[str, list[str]]] = []
    for message in history:
        role = _ROLES.get(message.role)
        if role is None or not message.content.strip() or (role == "assistant" and not turns):
            continue
        text = f"[output of a tool]\n{message.content}" if message.role == "tool" else message.content
        if turns and turns[-1][0] == role:
            turns[-1][1].append(text)
        else:
            turns.append((role, [text]))
    instructions = "\n\n".join(text for text in system if text.strip())
    return [
        *([{"role": "system", "content": instructions}] if instructions else []),
        *({"role": role, "content": "\n\n".join(texts)} for role, texts in turns),
    ]
