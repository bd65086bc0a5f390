"""What the documents assistant finds, quotes, and honestly does not find."""

import logging
import os
import sys
import unicodedata
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import pytest

from app.assistants import ask
from app.assistants.documents import DocumentsAssistant, folder, own_documentation
from app.assistants.documents.folding import fold, is_vietnamese
from app.assistants.documents.passages import (
    CODE_CHARACTERS_MAX,
    PASSAGE_CHARACTERS_MAX,
    PASSAGE_CHARACTERS_MIN,
    split_document,
)
from app.chat import Message, new_uuid
from app.errors import AssistantFailed

pytestmark = pytest.mark.anyio


PROJECT = {
    "README.md": """\
# Chat sessions

A store for chat sessions.

## Expiry

A session is gone from Redis after `SESSION_TTL_SECONDS` (default 3600) without use: its TTL slides
with every message.

To change the TTL, set the variable and restart:

```bash
SESSION_TTL_SECONDS=7200 chat-sessions serve
```

## Outages

With Redis down, PostgreSQL answers. Nothing is lost.
""",
    "docs/operations.md": """\
# Operations

## Backups

Take them with `pg_dump` every night. Keep seven of them.

## Metrics

The service counts hits and misses.
""",
    "docs/đấu thầu.md": """\
# Luật Đấu thầu

## Điều kiện tham gia

Nhà thầu phải có đăng ký kinh doanh và không bị cấm tham gia.

## Bảo đảm dự thầu

Giá trị bảo đảm từ 1% đến 3% giá gói thầu.
""",
}


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


@asynccontextmanager
async def documents(root, files=None):
    write(root, PROJECT if files is None else files)
    assistant = DocumentsAssistant(root)
    try:
        yield assistant
    finally:
        await assistant.close()


def history(*texts):
    """A user's message, the answer to it, a user's message, and so on."""
    return [
        Message(
            message_id=new_uuid(),
            role=("user", "assistant")[index % 2],
            content=text,
            created_at=datetime(2025, 1, 1, tzinfo=UTC),
            seq=index + 1,
        )
        for index, text in enumerate(texts)
    ]


async def asked(assistant, *texts):
    return await ask(assistant, history(*texts), deadline_seconds=30)


# What it can be asked about


async def test_its_topics_are_titles_of_documents_that_answer_a_question_about_them(tmp_path):
    long = "\n\n".join(["A paragraph about backups. " * 30] * 5)
    files = {
        "small.md": "# Restoring\n\nOne line.\n",
        "large.md": f"# Backups\n\n{long}",
        "untitled.txt": "No heading at all.\n\n" * 200,
        "stop.md": f"# How to do it\n\n{long}",
    }
    async with documents(tmp_path, files) as assistant:
        assert assistant.topics == ("Backups", "Restoring")
        for topic, file in (("Backups", "large.md"), ("Restoring", "small.md")):
            assert (await asked(assistant, f"What is there about “{topic}”?")).sources[0] == file
            assert (await asked(assistant, f"Có gì về “{topic}”?")).sources[0] == file


async def test_of_this_projects_own_documentation_there_are_three():
    root, only = own_documentation()
    assistant = DocumentsAssistant(root, only=only)
    assert len(assistant.topics) == 3
    await assistant.close()


# Finding


@pytest.mark.parametrize(
    "question",
    [
        "How long do sessions live?",
        "When does a session expire?",
        "session ttl",
        "What is SESSION_TTL_SECONDS?",
    ],
)
async def test_the_life_of_a_session_is_found_by_many_words(tmp_path, question):
    async with documents(tmp_path) as assistant:
        answer = await asked(assistant, question)
    assert answer.sources[0] == "README.md"
    assert "From README.md, “Chat sessions › Expiry”:" in answer.text
    assert "`SESSION_TTL_SECONDS` (default 3600)" in answer.text


async def test_a_code_block_is_quoted_whole_with_the_line_that_introduces_it(tmp_path):
    async with documents(tmp_path) as assistant:
        answer = await asked(assistant, "How do I change the TTL?")
    assert "restart:\n\n```bash\nSESSION_TTL_SECONDS=7200 chat-sessions serve\n```" in answer.text


async def test_other_forms_of_an_english_word_are_found(tmp_path):
    async with documents(tmp_path) as assistant:
        answer = await asked(assistant, "counting metric")
    assert answer.sources == ("docs/operations.md",)


async def test_a_word_in_the_heading_outweighs_the_same_word_in_a_text(tmp_path):
    other = "# Other\n\n" + "Owls and mice and owls again, at length. " * 3
    files = {"a.md": other, "b.md": "# Owls\n\nThey hunt at night.\n", "c.md": "# Mice\n\nThey hide.\n"}
    async with documents(tmp_path, files) as assistant:
        answer = await asked(assistant, "owls")
    assert answer.sources[0] == "b.md"


async def test_sources_are_named_once_and_best_first(tmp_path):
    files = {
        "one.md": "# Owls\n\n## Owls at night\n\nOwls hunt.\n\n## Owls at day\n\nOwls sleep.\n",
        "two.md": "# Birds\n\nSome owls are small.\n",
        "three.md": "# Fish\n\nThey swim.\n",
        "four.md": "# Cats\n\nThey purr.\n",
    }
    async with documents(tmp_path, files) as assistant:
        answer = await asked(assistant, "owls")
    assert answer.sources[0] == "one.md"
    assert len(set(answer.sources)) == len(answer.sources)
    assert answer.text.count("From one.md") == 2


async def test_a_text_that_stands_in_two_files_is_quoted_once(tmp_path):
    async with documents(
        tmp_path, {"a.md": "Owls hunt.", "b.md": "Owls hunt.", "c.md": "Mice."}
    ) as assistant:
        answer = await asked(assistant, "owls")
    assert answer.text.count("Owls hunt.") == 1
    assert answer.sources == ("a.md",)


# Vietnamese


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize(
    "question",
    [
        "Điều kiện tham gia đấu thầu?",
        "dieu kien tham gia dau thau",
        "ĐIỀU KIỆN THAM GIA",
        "Dieu kien dang ky",
    ],
)
async def test_vietnamese_is_found_with_and_without_accents_in_both_forms(tmp_path, question, form):
    async with documents(tmp_path) as assistant:
        answer = await asked(assistant, unicodedata.normalize(form, question))
    assert answer.sources[0] == "docs/đấu thầu.md"
    assert "Nhà thầu phải có đăng ký kinh doanh" in answer.text


async def test_documents_in_nfd_are_found_and_quoted_byte_for_byte(tmp_path):
    text = unicodedata.normalize("NFD", "Giá trị bảo đảm dự thầu là ba phần trăm.")
    async with documents(tmp_path, {"a.txt": text, "b.txt": "Khác."}) as assistant:
        answer = await asked(assistant, "bảo đảm dự thầu")
    assert text in answer.text


async def test_the_d_with_a_stroke_is_a_d(tmp_path):
    async with documents(tmp_path, {"a.md": "Đà Nẵng đẹp.", "b.md": "Huế."}) as assistant:
        assert (await asked(assistant, "da nang")).sources == ("a.md",)
        assert (await asked(assistant, "Ðà Nẵng")).sources == ("a.md",)


async def test_of_two_words_without_accents_alike_the_one_as_written_comes_first(tmp_path):
    files = {"a.md": "Cái bàn màu xanh.", "b.md": "Cái bán màu xanh.", "c.md": "Khác.", "d.md": "Nữa."}
    async with documents(tmp_path, files) as assistant:
        assert (await asked(assistant, "bàn màu")).sources[0] == "a.md"
        assert (await asked(assistant, "bán màu")).sources[0] == "b.md"


async def test_a_vietnamese_question_finds_english_documentation(tmp_path):
    async with documents(tmp_path) as assistant:
        answer = await asked(assistant, "Phiên chat tồn tại bao lâu?")
    assert answer.text.startswith("Tài liệu viết như sau:")
    assert "Trích từ README.md, “Chat sessions › Expiry”:" in answer.text


@pytest.mark.parametrize(
    "question", ["Phiên là gì?", "Tôi là ai", "tiếng Việt", unicodedata.normalize("NFD", "đó")]
)
def test_vietnamese_is_recognised(question):
    assert is_vietnamese(question)


@pytest.mark.parametrize(
    "question", ["How are you?", "Où est la bibliothèque ?", "¿Qué tal, señor?", "Größe"]
)
def test_other_languages_are_not_taken_for_vietnamese(question):
    assert not is_vietnamese(question)


def test_folding_drops_accents_case_and_strokes():
    assert fold("ĐƯỜNG Phố, Größe, ÉTÉ, İ") == "duong pho, grosse, ete, i"


# Follow-ups


async def test_a_question_that_refers_back_is_answered_about_the_earlier_one(tmp_path):
    async with documents(tmp_path) as assistant:
        answer = await asked(assistant, "How long do sessions live?", "One hour.", "And how do I change it?")
    assert "SESSION_TTL_SECONDS=7200" in answer.text


async def test_a_vietnamese_question_that_refers_back_is_answered_about_the_earlier_one(tmp_path):
    async with documents(tmp_path) as assistant:
        answer = await asked(assistant, "Bảo đảm dự thầu là bao nhiêu?", "…", "Giải thích thêm về điều đó")
    assert "từ 1% đến 3%" in answer.text


async def test_a_short_question_is_ranked_by_the_earlier_one(tmp_path):
    files = {
        "owl.md": "# Owl\n\nIts food is mice.\n",
        "cow.md": "# Cow\n\nIts food is grass.\n",
        "fish.md": "# Fish\n\nThey swim.\n",
        "bee.md": "# Bee\n\nIt flies.\n",
    }
    async with documents(tmp_path, files) as assistant:
        assert (await asked(assistant, "What is a cow?", "An animal.", "Which food?")).sources[0] == "cow.md"
        assert (await asked(assistant, "What is an owl?", "A bird.", "Which food?")).sources[0] == "owl.md"


async def test_asking_for_more_goes_on_to_what_was_not_quoted_yet(tmp_path):
    files = {f"{n}.md": f"# Owls\n\nOwls: fact number {n}.\n" for n in range(6)}
    async with documents(tmp_path, {**files, "x.md": "Mice."}) as assistant:
        first = await asked(assistant, "owls")
        second = await asked(assistant, "owls", first.text, "Tell me more")
    assert len(second.sources) == 3
    assert set(first.sources).isdisjoint(second.sources)


async def test_a_new_topic_without_an_answer_does_not_get_the_old_topics(tmp_path):
    async with documents(tmp_path) as assistant:
        answer = await asked(assistant, "How long do sessions live?", "One hour.", "Quantum physics?")
    assert answer.sources == ()


async def test_a_full_question_on_a_new_topic_is_not_pulled_to_the_old_one(tmp_path):
    files = {
        "backups.md": "# Backups\n\nNightly.\n",
        "metrics.md": "# Metrics\n\nOwls hunt here, too.\n",
        **{f"{n}.md": f"# Birds {n}\n\nThey fly.\n" for n in range(9)},
    }
    question = "Backups, metrics, logs?"
    async with documents(tmp_path, files) as assistant:
        alone = await asked(assistant, question)
        later = await asked(assistant, "Owls that hunt?", "At night.", question)
    assert alone.sources == ("backups.md", "metrics.md")
    assert later == alone


# Nothing found


async def test_no_match_is_an_honest_answer_that_says_what_was_searched(tmp_path):
    async with documents(tmp_path) as assistant:
        answer = await asked(assistant, "What is the weather in Paris?")
    assert answer.sources == ()
    assert "I found nothing about that" in answer.text
    assert "3 files: README.md, docs/operations.md, docs/đấu thầu.md" in answer.text


async def test_no_match_is_said_in_vietnamese_to_a_vietnamese_question(tmp_path):
    async with documents(tmp_path, {"a.md": "Owls."}) as assistant:
        answer = await asked(assistant, "Thời tiết Hà Nội?")
    assert answer.sources == ()
    assert "Tôi không tìm thấy thông tin nào" in answer.text
    assert "một tệp: a.md" in answer.text


async def test_one_stray_word_of_a_long_question_is_no_match(tmp_path):
    async with documents(tmp_path) as assistant:
        answer = await asked(assistant, "Which night train goes from Berlin to Vienna in winter?")
    assert answer.sources == ()


@pytest.mark.parametrize("question", ["?", "🦉", "how is it", " . ", "\u200b"])
async def test_a_question_without_words_to_look_for_is_answered_honestly(tmp_path, question):
    async with documents(tmp_path) as assistant:
        answer = await asked(assistant, question)
    assert answer.sources == ()
    assert "I found nothing" in answer.text


async def test_an_empty_folder_is_said_in_the_log_and_in_the_answer(tmp_path, caplog):
    async with documents(tmp_path, {}) as assistant:
        answer = await asked(assistant, "owls")
    assert "nothing to search" in caplog.text
    assert "DOCUMENTS_DIR" in answer.text


# Hostile questions


@pytest.mark.parametrize(
    "question",
    [
        'owls"',
        '"owls',
        '""" owls',
        "owls*",
        "NEAR(owls mice)",
        'NEAR("owls" "mice", 10)',
        "owls AND",
        "NOT owls",
        "heading: owls",
        "{heading body} : owls",
        "^owls",
        "-owls",
        "owls' OR 1=1; --",
        "owls'; DROP TABLE --",
        "owls + (",
        "owls\0",
    ],
)
async def test_the_search_syntax_of_fts5_is_nothing_but_words(tmp_path, question):
    async with documents(tmp_path, {"a.md": "Owls hunt mice.", "b.md": "Something else."}) as assistant:
        answer = await asked(assistant, question)
        again = await asked(assistant, "owls")
    assert answer.sources == again.sources == ("a.md",)


@pytest.mark.parametrize(
    "question",
    [
        "owls " + "x" * 1_000_000,
        "owls " * 200_000,
        "owls " + '"' * 500_000,
        "owls " + "\u0301" * 500_000,
        "owls? " + "? " * 300_000,
    ],
)
async def test_a_huge_question_is_answered_in_bounded_time(tmp_path, question):
    async with documents(tmp_path, {"a.md": "Owls hunt.", "b.md": "Else."}) as assistant:
        answer = await ask(assistant, history(question), deadline_seconds=5)
    assert answer.sources == ("a.md",)


async def test_a_question_of_many_different_words_is_bounded_too(tmp_path):
    question = " ".join(f"word{n}" for n in range(100_000))
    async with documents(tmp_path) as assistant:
        answer = await ask(assistant, history(*[question] * 9), deadline_seconds=5)
    assert answer.sources == ()


async def test_after_close_there_is_no_answer(tmp_path):
    async with documents(tmp_path) as assistant:
        pass
    with pytest.raises(AssistantFailed, match="ProgrammingError"):
        await asked(assistant, "owls")


# Reading the folder


async def test_only_text_files_that_nobody_hid_are_read(tmp_path):
    files = {
        "a.md": "owls",
        "b.MARKDOWN": "owls",
        "c.txt": "owls",
        "d.rst": "owls",
        "e.py": "owls",
        "f": "owls",
        ".g.md": "owls",
        ".data/h.md": "owls",
        ".venv/i.md": "owls",
        "node_modules/j.md": "owls",
        "deep/er/k.md": "owls",
    }
    write(tmp_path, files)
    assert list(folder.read_folder(tmp_path)) == ["a.md", "b.MARKDOWN", "c.txt", "d.rst", "deep/er/k.md"]


async def test_links_are_followed_inside_the_folder_only(tmp_path, caplog):
    inside = tmp_path / "inside"
    write(tmp_path, {"outside/secret.md": "secret", "inside/..data/real.md": "owls"})
    (inside / "config.md").symlink_to(inside / "..data" / "real.md")
    (inside / "secret.md").symlink_to(tmp_path / "outside" / "secret.md")
    (inside / "folder").symlink_to(tmp_path / "outside")
    (inside / "loop").symlink_to(inside)
    (inside / "nowhere.md").symlink_to(tmp_path / "missing")
    assert folder.read_folder(inside) == {"config.md": "owls"}
    assert "a link out of the folder: secret.md" in caplog.text


async def test_a_pipe_does_not_stop_the_start(tmp_path):
    os.mkfifo(tmp_path / "pipe.md")
    assert folder.read_folder(tmp_path) == {}


async def test_what_a_bound_leaves_out_is_logged_once_with_the_reason(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(folder, "FILE_BYTES_MAX", 10)
    monkeypatch.setattr(folder, "TOTAL_BYTES_MAX", 25)
    monkeypatch.setattr(folder, "FILES_MAX", 3)
    sizes = {"a.md": 10, "b.md": 11, "c.md": 10, "d.md": 10, "e.md": 5, "f.md": 1, "g.md": 1}
    write(tmp_path, {name: "x" * size for name, size in sizes.items()})
    with caplog.at_level(logging.WARNING):
        assert list(folder.read_folder(tmp_path)) == ["a.md", "c.md", "e.md"]
    assert [record.getMessage() for record in caplog.records] == [
        "left out of the documents, larger than 10 bytes: b.md",
        "left out of the documents, beyond 25 bytes in all: d.md",
        "left out of the documents, beyond 3 files: f.md, g.md",
    ]


async def test_files_in_other_encodings_are_read_as_far_as_possible(tmp_path, caplog):
    write(
        tmp_path,
        {
            "bom.md": b"\xef\xbb\xbf# Owls",
            "latin.md": b"caf\xe9 owls",
            "nul.md": b"owls\0mice",
            "windows.txt": "Cú mèo".encode("utf-16"),
        },
    )
    assert folder.read_folder(tmp_path) == {
        "bom.md": "# Owls",
        "latin.md": "caf\ufffd owls",
        "nul.md": "owls\ufffdmice",
        "windows.txt": "Cú mèo",
    }
    assert "not UTF-8, read with replacement characters: latin.md, nul.md" in caplog.text


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names")
async def test_a_file_name_that_is_not_unicode_makes_a_source_that_can_be_stored(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.md")).write_text("owls")
    async with documents(tmp_path, {"b.md": "mice"}) as assistant:
        answer = await asked(assistant, "owls")
    assert answer.sources == ("caf\ufffd.md",)


def test_the_projects_own_documentation_is_beside_the_package():
    root, only = own_documentation()
    assert (root / "app" / "chat.py").is_file()
    assert "README.md" in only


# Passages


def passages(text, file="a.md"):
    return [(p.headings, p.text) for p in split_document(file, text)]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("one\ntwo\n  three", "one two three"),
        ("one  \ntwo\\\nthree", "one\ntwo\\\nthree"),
        ("say:\n- one\n  goes on\n* two\n1. three", "say:\n- one goes on\n* two\n1. three"),
        ("-1 and\n*two*\n2026 was", "-1 and *two* 2026 was"),
        ("| a |\n|---|\n| b |\nafter", "| a |\n|---|\n| b |\nafter"),
        ("> one\n> two", "> one\n> two"),
        ("    x = 1\n    y = 2", "    x = 1\n    y = 2"),
        ("```\none\ntwo\n```", "```\none\ntwo\n```"),
    ],
)
def test_a_line_that_is_broken_for_its_writer_alone_goes_on(written, read):
    assert passages(written) == [((), read)]
    assert passages(written, "a.txt") == [((), "\n".join(line.rstrip() for line in written.split("\n")))]


def test_a_passage_never_crosses_a_heading_and_knows_those_above_it():
    text = "intro\n\n# A\none\n## B ##\ntwo\n### C\n\n## D\nthree\n# E\nfour\n"
    assert passages(text) == [
        ((), "intro"),
        (("A",), "one"),
        (("A", "B"), "two"),
        (("A", "D"), "three"),
        (("E",), "four"),
    ]


def test_underlined_headings_are_headings():
    text = "Title\n=====\n\none\n\nPart\n----\n\ntwo\n\n---\n\nthree\n"
    assert passages(text) == [(("Title",), "one"), (("Title", "Part"), "two\n\nthree")]


def test_restructured_text_has_levels_by_order_and_overlines():
    text = "#####\nTitle\n#####\n\none\n\nPart\n~~~~\n\ntwo\n\nOther\n~~~~~\n\n# no heading\n"
    assert passages(text, "a.rst") == [
        (("Title",), "one"),
        (("Title", "Part"), "two"),
        (("Title", "Other"), "# no heading"),
    ]


def test_headings_are_shown_without_markup():
    assert passages("# The `x` [link](http://h) **bold** ![logo](a.png)\n\none") == [
        (("The x link bold logo",), "one")
    ]


def test_a_hash_in_a_code_block_is_no_heading_and_the_block_stays_whole():
    block = "```bash\n# a comment\n\nmake run\n" + "echo owls\n" * 200 + "```"
    assert passages(f"# A\n\nRun:\n\n{block}\n\nafter") == [(("A",), f"Run:\n\n{block}"), (("A",), "after")]


def test_a_fence_is_closed_only_by_one_of_its_kind_and_length():
    text = "````\n```\n# x\n~~~\n````\n\n# B\n\nb"
    assert passages(text) == [((), "````\n```\n# x\n~~~\n````"), (("B",), "b")]


def test_front_matter_comments_and_tags_are_no_text():
    text = '---\ntitle: x\n---\n<!-- a\n\n# b\n-->\n<p align="center">\nowls\n</p>\n'
    assert passages(text) == [((), "owls")]


def test_long_sections_are_cut_into_passages_of_a_useful_size():
    text = "\n\n".join("Owls hunt mice at night. " * 8 for _ in range(40))
    sizes = [len(text) for _, text in passages(text)]
    assert min(sizes[:-1]) >= PASSAGE_CHARACTERS_MIN
    assert max(sizes) <= PASSAGE_CHARACTERS_MAX


def test_a_cut_table_repeats_its_header():
    rows = [f"| SETTING_{n} | {n} | what it is for |" for n in range(100)]
    head = "| name | default | meaning |\n|---|---|---|\n"
    found = [text for _, text in passages(head + "\n".join(rows))]
    assert len(found) > 1
    assert all(text.startswith(head) for text in found)
    assert [row for text in found for row in text.removeprefix(head).split("\n")] == rows


@pytest.mark.parametrize(
    "text",
    [
        "a" * 300_000,
        "a " * 150_000,
        "![" * 150_000,
        "```\n" + "x" * 300_000,
        "# a\n" * 75_000,
        "=\n" * 150_000,
        "|a\n" * 99_000,
    ],
    ids=["one word", "one line", "images", "open fence", "headings", "rules", "table"],
)
@pytest.mark.timeout(20)
def test_no_text_makes_a_passage_without_bound(text):
    assert max((len(found) for _, found in passages(text)), default=0) <= CODE_CHARACTERS_MAX
