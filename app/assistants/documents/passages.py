"""Documents cut into passages: small enough to be an answer, large enough to make sense alone.

A passage never crosses a heading and knows the headings above it. It has 600 to 1,200 characters where its
section has as many. A code block is kept whole up to 4,000 characters and stays with the line that
introduces it; a table that has to be cut repeats its header. Where Markdown breaks a line only for its writer, the passage
goes on: a reader's lines are of another length. No input makes a longer passage than a block and its introduction, and every
text is read in linear time.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

PASSAGE_CHARACTERS_MIN = 600
PASSAGE_CHARACTERS_MAX = 1_200
CODE_CHARACTERS_MAX = 4_000
HEADING_CHARACTERS_MAX = 160

_FENCE = re.compile(r"\s*(`{3,}(?=[^`]*$)|~{3,})")
_NUMBERED = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*))?$")
_RULE = re.compile(r"""\s{0,3}([-=~^"'`*+#:.<>_])\1{2,}\s*$""")
_TAGS_ONLY = re.compile(r"\s*(?:</?[a-zA-Z][^<>]*>\s*)+$")
# Bounded, because a file of nothing but `![` would otherwise take quadratic time.
_IMAGE = re.compile(r"!\[([^\]\n]{0,200})\]\([^)\n]{0,500}\)")
_LINK = re.compile(r"\[([^\]\n]{0,200})\]\([^)\n]{0,500}\)")
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+")
# Of Markdown: an item of a list, a row of a table, a quotation.
_OWN_LINE = re.compile(r"\s*(?:[-*+]\s|\d{1,9}[.)]\s|[|>])")
_HARD_BREAK = ("  ", "\\")
_INDENTED_CODE = ("    ", "\t")
_UNDERLINE_LEVELS = {"=": 1, "-": 2}


@dataclass(frozen=True, slots=True)
class Passage:
    """`text` is the document's own; `headings` lead to it, outermost first."""

    file: str
    headings: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True)
class _Heading:
    level: int
    title: str


@dataclass(frozen=True, slots=True)
class _Block:
    text: str
    is_code: bool = False


def split_document(file: str, text: str) -> Iterator[Passage]:
    """The passages of a Markdown, reStructuredText or plain text file, in order."""
    above: list[_Heading] = []
    section: list[_Block] = []
    is_markdown = file.lower().endswith((".md", ".markdown"))
    for part in _parts(text.splitlines(), is_rst=file.lower().endswith(".rst")):
        if isinstance(part, _Block):
            section.append(part if part.is_code else _in_lines(part, is_markdown=is_markdown))
            continue
        yield from _passages(file, above, section)
        section = []
        above = [heading for heading in above if heading.level < part.level]
        above.append(part)
    yield from _passages(file, above, section)


def _in_lines(paragraph: _Block, *, is_markdown: bool) -> _Block:
    """With the line breaks that a reader is meant to see."""
    lines: list[list[str]] = []
    goes_on = False
    is_wrapped = is_markdown and not paragraph.text.startswith(_INDENTED_CODE)
    for line in paragraph.text.split("\n"):
        if goes_on and not _OWN_LINE.match(line):
            lines[-1].append(line.strip())
        else:
            lines.append([line.rstrip()])
        goes_on = is_wrapped and not line.endswith(_HARD_BREAK) and not line.lstrip().startswith("|")
    return _Block("\n".join(map(" ".join, lines)))


def _passages(file: str, above: list[_Heading], section: list[_Block]) -> Iterator[Passage]:
    headings = tuple(heading.title for heading in above if heading.title)
    for text in _packed(section):
        yield Passage(file, headings, text)


def _parts(lines: list[str], *, is_rst: bool) -> Iterator[_Heading | _Block]:
    rst_levels: dict[str, int] = {}
    paragraph: list[str] = []
    at = _front_matter_end(lines)
    while at < len(lines):
        line = lines[at]
        fence = None if is_rst else _FENCE.match(line)
        if fence:
            yield from _paragraph(paragraph)
            end = _fence_end(lines, at, fence[1])
            yield _Block("\n".join(lines[at:end]), is_code=True)
            at = end
            continue
        if not is_rst and line.lstrip().startswith("<!--"):
            yield from _paragraph(paragraph)
            at = _comment_end(lines, at)
            continue
        numbered = None if is_rst else _NUMBERED.match(line)
        rule = _RULE.match(line)
        if numbered:
            yield from _paragraph(paragraph)
            yield _Heading(len(numbered[1]), _title((numbered[2] or "").strip().rstrip("#")))
        elif rule and (title := _underlined(paragraph)) and (is_rst or rule[1] in _UNDERLINE_LEVELS):
            level = rst_levels.setdefault(rule[1], len(rst_levels) + 1)
            yield _Heading(level if is_rst else _UNDERLINE_LEVELS[rule[1]], _title(title))
            paragraph.clear()
        elif line.strip():
            paragraph.append(line)
        else:
            yield from _paragraph(paragraph)
        at += 1
    yield from _paragraph(paragraph)


def _paragraph(lines: list[str]) -> Iterator[_Block]:
    kept = [line for line in lines if not _TAGS_ONLY.match(line) and not _RULE.match(line)]
    lines.clear()
    text = _IMAGE.sub(r"\1", "\n".join(kept)).strip("\n")
    if text.strip():
        yield _Block(text)


def _underlined(paragraph: list[str]) -> str | None:
    """The one line that a rule underlines; reStructuredText may have a rule above it, too."""
    match paragraph:
        case [title]:
            return title.strip()
        case [over, title] if _RULE.match(over):
            return title.strip()
    return None


def _title(text: str) -> str:
    plain = (
        _LINK.sub(r"\1", _IMAGE.sub(r"\1", text[: 8 * HEADING_CHARACTERS_MAX]))
        .replace("`", "")
        .replace("**", "")
    )
    return " ".join(plain.split())[:HEADING_CHARACTERS_MAX]


def _front_matter_end(lines: list[str]) -> int:
    if lines and lines[0].rstrip() == "---":
        for at, line in enumerate(lines[1:100], start=1):
            if line.rstrip() in {"---", "..."}:
                return at + 1
    return 0


def _fence_end(lines: list[str], start: int, fence: str) -> int:
    for at in range(start + 1, len(lines)):
        line = lines[at].strip()
        if len(line) >= len(fence) and not line.strip(fence[0]):
            return at + 1
    return len(lines)


def _comment_end(lines: list[str], start: int) -> int:
    return next((at + 1 for at in range(start, len(lines)) if "-->" in lines[at]), len(lines))


def _packed(blocks: list[_Block]) -> Iterator[str]:
    held: list[str] = []
    size = 0
    for block in blocks:
        for piece in _pieces(block):
            introduced = bool(held) and held[-1].endswith(":") and block.is_code
            full = size >= PASSAGE_CHARACTERS_MIN or size + len(piece) > PASSAGE_CHARACTERS_MAX
            if held and full and not introduced:
                yield "\n\n".join(held)
                held, size = [], 0
            held.append(piece)
            size += len(piece) + 2
    if held:
        yield "\n\n".join(held)


def _pieces(block: _Block) -> Iterator[str]:
    whole = CODE_CHARACTERS_MAX if block.is_code else PASSAGE_CHARACTERS_MAX
    if len(block.text) <= whole:
        yield block.text
        return
    lines = block.text.split("\n")
    head = ""
    if lines[0].lstrip().startswith("|") and sum(map(len, lines[:2])) < PASSAGE_CHARACTERS_MIN:
        head = "\n".join(lines[:2]) + "\n"
        lines = lines[2:]
    for piece in _joined(lines, "\n", PASSAGE_CHARACTERS_MAX - len(head)):
        yield head + piece


def _joined(units: Iterable[str], separator: str, limit: int) -> Iterator[str]:
    """The units, joined up to the limit; one that is longer is cut at sentences, then at spaces."""
    held: list[str] = []
    size = 0
    for unit in units:
        if held and size + len(unit) > limit:
            yield separator.join(held)
            held, size = [], 0
        if len(unit) > limit:
            yield from (
                _joined(_SENTENCE_END.split(unit), " ", limit) if separator == "\n" else _cut(unit, limit)
            )
            continue
        held.append(unit)
        size += len(unit) + len(separator)
    if held:
        yield separator.join(held)


def _cut(text: str, limit: int) -> Iterator[str]:
    at = 0
    while len(text) - at > limit:
        space = text.rfind(" ", at + limit // 2, at + limit)
        end = space if space > 0 else at + limit
        yield text[at:end]
        at = end
    yield text[at:]
