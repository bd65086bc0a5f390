"""The commands, as they are called from a shell."""

import json
import os
import pty
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit
from uuid import UUID

import pytest
from redis import Redis

from app.chat import new_uuid, utc_now
from app.postgres.partitions import MONTHS_AHEAD, months_from, partition_name
from app.postgres.schema import REVISION
from app.redis_sessions.keys import session_key
from app.wiring import open_runtime
from tests.databases import migrate, new_database
from tests.factories import guide_value, new_append
from tests.integration.processes import called, command, environment, one_line, run, serving

COMMANDS = (
    "serve",
    "migrate",
    "partitions",
    "doctor",
    "show",
    "report",
    "mode",
    "adopt",
    "verify",
    "repair",
    "export",
    "import",
)

UNKNOWN = "01890000-0000-7000-8000-000000000000"
OUT = {
    "DATABASE_URL": "postgresql://chat:sesame@127.0.0.1:1/chat",
    "REDIS_URL": "redis://:sesame@127.0.0.1:1",
}

# Everything that a person can get wrong at the command line: the arguments are explained, with exit code 2.
WRONG = (
    "bogus",
    "migrate 0001",
    "partitions --ahead 121",
    "show",
    "show abc",
    f"show {UNKNOWN} --messages 0",
    "export out --month 2026-13",
    "export out --from yesterday",
    "export out --from 2026-02-01 --to 2026-01-01",
    "export out --session abc",
    "export out --format xml",
    "import",
)


@pytest.fixture
def call(tmp_path):
    """Runs a command, its words in one text, in an empty folder."""
    return lambda words, **settings: called(*words.split(), cwd=tmp_path, **settings)


@pytest.fixture
def shell(tmp_path):
    """The same in a process of its own."""
    return lambda words, **settings: run(*words.split(), cwd=tmp_path, **settings)


@pytest.fixture
def urls(database_url, servers, database, redis):
    """The test's two stores, empty and in mode hybrid."""
    return {"DATABASE_URL": database_url, "REDIS_URL": servers.redis_url}


@pytest.fixture
async def unmigrated(servers, anyio_backend):
    async with new_database(servers, "chat_cli") as url:
        yield {"DATABASE_URL": url, "REDIS_URL": servers.redis_url}


@pytest.fixture
async def migrated(unmigrated):
    await migrate(unmigrated["DATABASE_URL"])
    return unmigrated


@pytest.fixture
async def set_revision(database, anyio_backend):
    """Changes what the database says its revision is, for the time of the test."""
    change = "UPDATE chat.alembic_version SET version_num = $1"
    async with database.connection() as conn:
        await conn.execute(change, "9999")
        yield "9999"
        await conn.execute(change, REVISION)


@pytest.fixture
async def session_id(settings, anyio_backend):
    """A session of `an` with three messages, in both stores."""
    return await recorded(settings)


@pytest.fixture
async def owned_by_redis(settings, anyio_backend):
    """The same where Redis is the source of truth."""
    return await recorded(settings.model_copy(update={"database_url": None, "redis_only_mode": True}))


async def recorded(settings) -> UUID:
    async with open_runtime(settings) as runtime:
        session_id = (await runtime.store.create_session("an")).session.session_id
        await runtime.store.append(new_append(session_id, "Xin chào", "a\tb\nc\x1b[31m", "[bold]ba[/bold]"))
    return session_id


@pytest.fixture(scope="module")
def service():
    """A service with embedded servers."""
    with TemporaryDirectory(prefix="chat-cli-") as name:
        Path(name).chmod(0o711)
        with serving(Path(name), DATA_DIR=Path(name) / "data") as started:
            yield started


def each(call, *words_of_all, **settings):
    """What came of each of some commands."""
    return {words: call(words, **settings) for words in words_of_all}


def rows_of(done):
    """What a command printed into a pipe, as lists of fields."""
    assert "\x1b" not in done.stdout
    assert "\x1b" not in done.stderr
    return [line.split("\t") for line in done.stdout.splitlines()]


def findings_of(done):
    """What the doctor found: subject -> status, finding and advice. A subject may be named twice; the worst wins."""
    header, *rows = rows_of(done)
    assert header == ["status", "subject", "finding", "what to do"]
    worst_last = sorted(rows, key=lambda row: ("pass", "warn", "fail").index(row[0]))
    return {subject: (status, finding, advice) for status, subject, finding, advice in worst_last}


# Help


def test_help_lists_every_command(call, shell):
    helped = {"--help": shell("--help"), **each(call, *(f"{name} --help" for name in COMMANDS))}

    assert {(done.returncode, done.stderr) for done in helped.values()} == {(0, "")}
    assert all(f" {name} " in helped["--help"].stdout for name in COMMANDS)
    assert all(f"Usage: python -m app {name} " in helped[f"{name} --help"].stdout for name in COMMANDS)
    assert "--ahead" in helped["partitions --help"].stdout
    assert "--json" in helped["doctor --help"].stdout


def test_a_command_reads_the_files_of_no_other_command(tmp_path):
    at_its_end = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); "
    done = subprocess.run(
        [sys.executable, "-c", f"{at_its_end} from app.cli.main import main; main()", "migrate", "--help"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    read = set(done.stderr.split())
    assert {"app.cli.main", "app.cli.migrate"} <= read
    assert read.isdisjoint({f"app.cli.{name.replace('-', '_')}" for name in COMMANDS} - {"app.cli.migrate"})
    assert read.isdisjoint({"app.wiring", "fastapi", "redis"})


def test_wrong_arguments_are_explained_and_nothing_is_done(call, shell):
    first, *others = WRONG
    results = {first: shell(first, **OUT), **each(call, *others, **OUT)}

    assert {words: (done.returncode, done.stdout) for words, done in results.items()} == dict.fromkeys(
        WRONG, (2, "")
    )
    assert all("Usage: " in done.stderr for done in results.values())
    assert "Traceback" not in results[first].stderr


@pytest.mark.parametrize(
    "words",
    [
        ("report", "sessions_per_day", "--user", "h\udce0"),
        ("search", "h\udce0 n\udcf4i"),
        ("search", "hà nội", "--user", "h\udce0"),
        ("export", "out", "--user", "h\udce0"),
    ],
)
def test_a_text_of_another_encoding_is_explained(tmp_path, words):
    done = called(*words, cwd=tmp_path, **OUT)

    assert (done.returncode, done.stdout) == (2, "")
    assert "holds bytes that are no" in done.stderr


def test_the_help_of_export_names_the_extra(call):
    assert "'chat-sessions[export]'" in call("export --help").stdout


def test_a_wrong_setting_is_one_line(shell):
    results = each(shell, "serve", f"show {UNKNOWN}", PORT="http")

    assert {one_line(done) for done in results.values()} == {"error: PORT=http: should be a whole number"}


def test_commands_that_need_a_store_say_in_one_line_that_none_is_set(call):
    results = each(call, "migrate", f"show {UNKNOWN}")

    assert all("DATABASE_URL" in one_line(done) for done in results.values())


def test_postgresql_that_is_out_is_one_line_without_the_password(call):
    results = each(call, "migrate", "partitions", **OUT)

    lines = [one_line(done) for done in results.values()]
    assert all(line.startswith("error: PostgreSQL can't be reached: ") for line in lines)
    assert all(line.endswith(" (start PostgreSQL, or correct DATABASE_URL)") for line in lines)
    assert not any("sesame" in line for line in lines)


def test_postgresql_that_refuses_is_not_to_be_started(call, servers):
    elsewhere = urlsplit(servers.database_url)._replace(path="/nowhere").geturl()
    line = one_line(call("partitions", DATABASE_URL=elsewhere))

    assert 'database "nowhere" does not exist' in line
    assert line.endswith(" (look at PostgreSQL, or correct DATABASE_URL)")


def test_redis_that_is_out_is_one_line_without_the_password(call, urls):
    done = call("mode hybrid", **(urls | {"REDIS_URL": OUT["REDIS_URL"]}))

    line = one_line(done)
    assert line.startswith("error: redis: ")
    assert line.endswith(" (start Redis, or correct REDIS_URL)")
    assert "sesame" not in line


def test_commands_on_a_database_without_the_schema_say_in_one_line_what_to_run(call, unmigrated):
    results = each(call, "partitions", f"show {UNKNOWN}", **unmigrated)

    assert all(
        "migrate" in one_line(done) or "alembic upgrade head" in one_line(done) for done in results.values()
    )


# migrate


def test_migrate_brings_a_new_database_to_the_newest_revision_and_repeats_harmlessly(call, shell, unmigrated):
    first, second = shell("migrate", **unmigrated), call("migrate", **unmigrated)

    assert (first.returncode, first.stdout) == (0, f"schema revision {REVISION}, was none\n")
    assert (second.returncode, second.stdout) == (0, f"schema revision {REVISION}, as before\n")


def test_migrate_refuses_a_revision_that_it_does_not_know_in_one_line(call, urls, set_revision):
    line = one_line(call("migrate", **urls))

    assert line.startswith("error: the schema was not upgraded: ")
    assert f"'{set_revision}'" in line


# partitions


def test_partitions_are_made_and_listed_and_made_once(call, migrated):
    names = [partition_name(month) for month in months_from(utc_now().date(), MONTHS_AHEAD + 1)]

    made = call("partitions", **migrated)
    more = call(f"partitions --ahead {MONTHS_AHEAD + 1} --json", **migrated)

    assert rows_of(made) == [
        ["partition", "state"],
        *([name, "made"] for name in names[:-1]),
        ["chat_messages_legacy", ""],
    ]
    assert json.loads(more.stdout) == {"made": names[-1:], "partitions": [*names, "chat_messages_legacy"]}


# doctor


def test_the_doctor_finds_nothing_wrong_with_a_running_services_servers(shell, service):
    done = shell("doctor", DATA_DIR=service.banner["data"])

    found = findings_of(done)
    assert (done.returncode, done.stderr) == (0, "")
    assert found["schema"] == ("pass", f"revision {REVISION}", "")
    assert found["mode"] == ("pass", "hybrid", "")
    assert {status for status, *_ in found.values()} == {"pass"}
    assert {"postgres", "redis", "partitions", "redis memory", "postgres clock", "redis clock"} <= set(found)


def test_the_doctors_findings_are_json_too_and_each_that_is_not_well_has_advice(call):
    findings = json.loads(call("doctor --json", **OUT, REDIS_ONLY_MODE="true").stdout)

    assert {tuple(one) for one in findings} == {("status", "subject", "finding", "advice")}
    assert {one["subject"]: one["status"] for one in findings} == {"postgres": "fail", "redis": "fail"}
    assert all(one["advice"] for one in findings)
    assert "sesame" not in str(findings)


def test_the_doctor_fails_a_database_without_the_schema_and_says_what_to_run(call, unmigrated):
    done = call("doctor", **unmigrated)

    found = findings_of(done)
    assert done.returncode == 1
    assert found["schema"][0] == "fail"
    assert found["schema"][2] == "run `chat-sessions migrate`"
    assert found["postgres"][0] == "pass"


def test_the_doctor_fails_a_database_of_another_version(call, urls, set_revision):
    done = call("doctor", **urls)

    assert done.returncode == 1
    assert findings_of(done)["schema"] == (
        "fail",
        f"revision {set_revision}, this version needs {REVISION}",
        "run `chat-sessions migrate`",
    )


def test_the_doctor_fails_when_postgresql_is_out_and_still_looks_at_redis(call, urls):
    done = call("doctor", **urls | {"DATABASE_URL": OUT["DATABASE_URL"]})

    found = findings_of(done)
    assert (done.returncode, found["postgres"][0], found["redis"][0]) == (1, "fail", "pass")
    assert found["postgres"][2] == "start PostgreSQL, or correct DATABASE_URL"
    assert "Traceback" not in done.stderr


def test_redis_out_is_a_warning_in_hybrid_mode_and_a_failure_where_it_is_the_truth(call, service):
    hybrid = call("doctor", DATA_DIR=service.banner["data"], REDIS_URL=OUT["REDIS_URL"])
    redis_only = call("doctor", REDIS_URL=OUT["REDIS_URL"], REDIS_ONLY_MODE="true")

    assert (hybrid.returncode, findings_of(hybrid)["redis"][0]) == (0, "warn")
    assert (redis_only.returncode, findings_of(redis_only)["redis"][0]) == (1, "fail")
    assert (hybrid.stderr, redis_only.stderr) == ("", "")
    assert findings_of(redis_only)["redis"][2] == "start Redis, or correct REDIS_URL"


@pytest.fixture
async def allkeys_policy(redis, anyio_backend):
    before = (await redis.config_get("maxmemory-policy"))["maxmemory-policy"]
    await redis.config_set("maxmemory-policy", "allkeys-lru")
    yield
    await redis.config_set("maxmemory-policy", before)


def test_a_redis_that_evicts_at_will_is_a_failure_where_it_is_the_truth(call, urls, allkeys_policy):
    done = call("doctor", REDIS_URL=urls["REDIS_URL"], REDIS_ONLY_MODE="true")

    status, finding, advice = findings_of(done)["redis memory"]
    assert done.returncode == 1
    assert (status, advice) == ("fail", "use volatile-ttl or noeviction")
    assert "allkeys-lru" in finding


def test_without_urls_the_doctor_warns_that_servers_would_be_embedded(call):
    done = call("doctor")

    found = findings_of(done)
    assert done.returncode == 0
    assert {subject: status for subject, (status, *_) in found.items()} == {
        "postgres": "warn",
        "redis": "warn",
    }


# show


def test_show_tells_a_sessions_owner_messages_and_what_each_store_holds(call, urls, session_id):
    done = call(f"show {session_id}", **urls)

    rows = rows_of(done)
    facts = dict(row for row in rows if len(row) == 2)
    assert (done.returncode, done.stderr) == (0, "")
    assert (facts["session_id"], facts["user_id"], facts["total_messages"]) == (str(session_id), "an", "3")
    assert facts["postgres"] == "3 messages"
    assert facts["redis"].startswith("the newest 3 of 3 messages, ")
    assert [(row[0], *row[2:]) for row in rows if len(row) == 4] == [
        ("seq", "role", "content"),
        ("1", "user", "Xin chào"),
        ("2", "user", r"a b\nc\x1b[31m"),
        ("3", "user", "[bold]ba[/bold]"),
    ]


def test_show_gives_json_with_the_newest_messages_asked_for(call, urls, session_id):
    found = json.loads(call(f"show {session_id} --messages 2 --json", **urls).stdout)

    assert (found["session_id"], found["total_messages"]) == (str(session_id), 3)
    assert [(one["seq"], one["content"]) for one in found["messages"]] == [
        (2, "a\tb\nc\x1b[31m"),
        (3, "[bold]ba[/bold]"),
    ]


@pytest.fixture
async def in_vietnamese(settings, anyio_backend):
    async with open_runtime(settings) as runtime:
        session_id = (await runtime.store.create_session("an")).session.session_id
        await runtime.store.append(new_append(session_id, "Điều kiện 😀"))
        return session_id


@pytest.mark.parametrize("encoding", ["latin-1", "ascii:surrogateescape"])
def test_show_escapes_what_the_encoding_of_its_output_has_not(shell, urls, in_vietnamese, encoding):
    shown = shell(f"show {in_vietnamese}", PYTHONIOENCODING=encoding, **urls)
    found = shell(f"show {in_vietnamese} --json", PYTHONIOENCODING=encoding, **urls)

    assert (shown.returncode, shown.stderr) == (0, "")
    assert rows_of(shown)[-1][3] == r"\u0110i\u1ec1u ki\u1ec7n \U0001f600"
    assert json.loads(found.stdout)["messages"][0]["content"] == "Điều kiện 😀"


def test_show_on_a_terminal_draws_a_table_and_passes_no_escape_of_a_message_on(urls, session_id, tmp_path):
    terminal, inside = pty.openpty()
    with subprocess.Popen(
        command("show", str(session_id)),
        cwd=tmp_path,
        env=environment(TERM="xterm", COLUMNS=100, **urls),
        stdout=inside,
    ) as process:
        os.close(inside)
        printed = read_all(terminal)
    os.close(terminal)

    assert process.returncode == 0
    assert "┃" in printed
    assert "Xin chào" in printed
    assert "\x1b[31m" not in printed


def read_all(terminal):
    """What a program writes until it ends, which is an error to who reads on."""
    chunks = []
    with suppress(OSError):
        while chunk := os.read(terminal, 65536):
            chunks.append(chunk)
    return b"".join(chunks).decode()


def test_show_of_an_unknown_session_is_one_line(call, urls):
    line = one_line(call(f"show {UNKNOWN}", **urls))

    assert line == "error: Session not found. PostgreSQL: no row. Redis: nothing."


@pytest.mark.parametrize("out", ["DATABASE_URL", "REDIS_URL"])
def test_show_does_not_say_that_there_is_no_session_while_a_store_is_out(call, urls, out):
    line = one_line(call(f"show {UNKNOWN}", **(urls | {out: OUT[out]})))

    assert "not found" not in line
    assert line.startswith("error: whether there is such a session can't be said. PostgreSQL: ")
    assert "out (" in line
    assert line.endswith(f" (start what is out, or correct {out})")
    assert "sesame" not in line


@pytest.fixture
async def strangers(redis, anyio_backend):
    """Two keys that no version of ours would have written."""
    guide, other = new_uuid(), new_uuid()
    await redis.set(session_key(guide), guide_value(guide, "Xin chào"), ex=100)
    await redis.lpush(session_key(other), "a")
    return guide, other


def test_show_describes_what_is_no_session_of_ours(call, urls, strangers):
    guide, other = strangers

    assert "Redis: an entry in the guide's format, not adopted" in one_line(call(f"show {guide}", **urls))
    assert "Redis: something that is no session of ours" in one_line(call(f"show {other}", **urls))


def test_show_describes_a_session_that_redis_owns(call, urls, owned_by_redis):
    found = json.loads(call(f"show {owned_by_redis} --json", **urls).stdout)

    assert found["postgres"] == "no row"
    assert found["redis"].startswith("the newest 3 of 3 messages, owned by Redis, ")
    assert [one["seq"] for one in found["messages"]] == [1, 2, 3]


def test_show_answers_from_the_store_that_is_there(call, urls, session_id):
    without_redis = json.loads(
        call(f"show {session_id} --json", **urls | {"REDIS_URL": OUT["REDIS_URL"]}).stdout
    )
    without_postgres = json.loads(
        call(f"show {session_id} --json", **urls | {"DATABASE_URL": OUT["DATABASE_URL"]}).stdout
    )

    assert without_redis["redis"].startswith("out (")
    assert without_postgres["postgres"].startswith("out (")
    assert without_redis["messages"] == without_postgres["messages"]
    assert len(without_redis["messages"]) == 3


@pytest.fixture
async def short_lived(redis, session_id, anyio_backend):
    await redis.expire(session_key(session_id), 100)
    return session_id


def test_show_does_not_prolong_a_sessions_life(call, urls, short_lived):
    shown = json.loads(call(f"show {short_lived} --json", **urls).stdout)

    with Redis.from_url(urls["REDIS_URL"], db=1) as direct:
        assert 0 < direct.ttl(session_key(short_lived)) <= 100
    assert 0 < int(shown["redis"].rpartition("expires in ")[2].removesuffix(" s")) <= 100


# A running service's embedded servers


def test_commands_find_the_servers_of_a_running_service(shell, service):
    data_dir = service.banner["data"]
    with service.client() as client:
        session_id = client.post("/api/chat/sessions", params={"user_id": "an"}).json()["session_id"]

    results = each(
        shell,
        *("migrate", "partitions", "doctor", f"show {session_id} --json", "report sessions_per_day"),
        DATA_DIR=data_dir,
    )

    assert {done.returncode for done in results.values()} == {0}
    assert results["migrate"].stdout == f"schema revision {REVISION}, as before\n"
    assert findings_of(results["doctor"])["mode"] == ("pass", "hybrid", "")
    shown = json.loads(results[f"show {session_id} --json"].stdout)
    assert (shown["user_id"], shown["postgres"]) == ("an", "0 messages")
    assert shown["redis"].startswith("the newest 0 of 0 messages, ")


def test_only_our_account_can_read_where_the_servers_are(service):
    assert (Path(service.banner["data"]) / "urls.json").stat().st_mode & 0o777 == 0o600
