"""Files of SQL in which each statement has a name."""

import re


def parse_statements(source: str) -> dict[str, str]:
    """What follows `-- name --` up to the next name, by name, without its `;`. What stands before the first is a
    preamble.
    """
    parts = re.split(r"^-- (\w+) --$", source, flags=re.MULTILINE)[1:]
    return {name: body.strip().removesuffix(";") for name, body in zip(parts[::2], parts[1::2], strict=True)}
