"""`chat-sessions report`, as it is called from a shell."""

import asyncio
import json
import os
import pty
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from app.analytics.reports import REPORTS
from app.analytics.rollups import Rollups
from app.cli.main import app
from app.postgres.store import PostgresChatSessionStore
from app.store import Append
from tests.factories import new_message

pytestmark = pytest.mark.anyio

MARCH = ("--from", "2026-03-10", "--to", "2026-03-12")
PROJECT = Path(__file__).parents[2]
CLOSED_PORT = "postgresql://chat:secret@127.0.0.1:1/chat"


async def count_all(database):
    counting = Rollups(database, timezone="UTC")
    while (now := await counting.pending()).marks or now.backfills:
        await counting.round()


@pytest.fixture
async def recorded(database):
    """A question and three answers at noon of 2026-03-10, and a question late on the 11th."""
    store = PostgresChatSessionStore(database, ttl_seconds=3600)
    session = (await store.create_session("an")).session
    first, second = datetime(2026, 3, 10, 12, tzinfo=UTC), datetime(2026, 3, 11, 23, 30, tzinfo=UTC)
    answers = [
        new_message("Có.", role="assistant", created_at=first, metadata=metadata)
        for metadata in (
            {"processing_time_ms": 1234, "sources": ["luật.md", "[bold]faq[/bold] \t.md"]},
            {"processing_time_ms": 1235, "sources": ["luật.md"]},
            {"processing_time_ms": 1235},
        )
    ]
    questions = [new_message("Có không?", created_at=moment) for moment in (first, second)]
    await store.append(Append(session_id=session.session_id, messages=(*questions, *answers)))
    await count_all(database)


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Runs the command in an empty folder: no .env and no running service is found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_DIR", raising=False)

    async def call_(*arguments: str, database_url: str = "") -> Result:
        monkeypatch.setenv("DATABASE_URL", database_url)
        # In a thread: the command has an event loop of its own.
        return await asyncio.to_thread(CliRunner().invoke, app, ["report", *arguments])

    return call_


async def test_a_pipe_gets_one_line_a_row_with_tabs(call, recorded, database_url):
    done = await call("response_time", *MARCH, "--user", "an", database_url=database_url)

    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == "answers\ttimed_answers\tavg_ms\tp50_ms\tp95_ms\n3\t3\t1234.7\t1235.0\t1235.0\n"


async def test_a_tab_in_a_source_is_no_column(call, recorded, database_url):
    done = await call("top_sources", *MARCH, "--limit", "2", database_url=database_url)

    assert done.stdout.splitlines() == [
        "source\tcitations\tsessions",
        "luật.md\t2\t1",
        "[bold]faq[/bold]  .md\t1\t1",
    ]


async def test_json_has_the_numbers_whole_and_the_range(call, recorded, database_url):
    done = await call("response_time", *MARCH, "--json", "--user", "an", database_url=database_url)

    found = json.loads(done.stdout)
    assert found.pop("rows") == [
        {
            "answers": 3,
            "timed_answers": 3,
            "avg_ms": pytest.approx(3704 / 3, abs=1e-9),
            "p50_ms": 1235,
            "p95_ms": 1235,
        }
    ]
    assert found == {
        "report": "response_time",
        "from": "2026-03-10T00:00:00.000Z",
        "to": "2026-03-12T00:00:00.000Z",
        "timezone": "UTC",
        "granularity": None,
        "complete": True,
        "lag_seconds": 0,
    }


async def test_days_are_dates_in_json(call, recorded, database_url):
    done = await call("active_users", *MARCH, "--json", database_url=database_url)

    assert json.loads(done.stdout)["rows"] == [
        {"day": "2026-03-10", "dau": 1, "wau": 1, "mau": 1},
        {"day": "2026-03-11", "dau": 1, "wau": 1, "mau": 1},
    ]


async def test_a_time_with_an_offset_is_that_instant(call, recorded, database_url):
    since = ("--from", "2026-03-12T06:30+07:00", "--to", "2026-03-12T06:30:00.001+07:00")

    done = await call("messages_by_role", *since, database_url=database_url)

    assert done.stdout.splitlines() == ["role\tmessages\tpercent", "user\t1\t100.0"]


async def test_without_a_range_the_last_30_days_are_reported(call, recorded, database_url):
    done = await call("sessions_per_day", "--json", database_url=database_url)

    found = json.loads(done.stdout)
    assert len(found["rows"]) == 30
    assert found["from"].endswith("T00:00:00.000Z")
    assert [row["sessions"] for row in found["rows"]].count(1) == 1
    assert datetime.fromisoformat(found["to"]) > datetime.now(UTC)
    assert found["rows"][-1]["day"] < found["to"][:10]


async def test_an_end_alone_is_the_end_of_30_days(call, recorded, database_url):
    done = await call("sessions_per_day", "--to", "2026-03-31", "--json", database_url=database_url)

    assert [json.loads(done.stdout)["rows"][index]["day"] for index in (0, -1)] == [
        "2026-03-01",
        "2026-03-30",
    ]


async def on_a_terminal(folder: Path, database_url: str, *arguments: str, cells: int = 160) -> str:
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "app", "report", *arguments),
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(PROJECT),
            "DATABASE_URL": database_url,
            "TERM": "xterm",
            "COLUMNS": str(cells),
        },
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    code = await process.wait()
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert code == 0, shown
    return shown


async def test_a_terminal_gets_a_table_with_a_source_as_it_was_written(tmp_path, recorded, database_url):
    shown = await on_a_terminal(tmp_path, database_url, "top_sources", *MARCH)

    assert "2026-03-10 00:00 to 2026-03-12 00:00 UTC" in shown
    assert "┃" in shown
    assert "│ [bold]faq[/bold]  .md │ 1 " in shown


async def test_a_series_is_a_plot_in_a_terminal(tmp_path, recorded, database_url):
    shown = await on_a_terminal(tmp_path, database_url, "traffic", *MARCH, "--granularity", "day")

    bars = [line.count("█") for line in shown.splitlines() if "2026-03-1" in line and "│" in line]
    assert bars == [0, 0]
    shown = await on_a_terminal(tmp_path, database_url, "response_time_percentiles", *MARCH)
    assert "█" * 40 in shown


async def test_bars_have_the_room_that_the_numbers_leave(tmp_path, recorded, database, database_url):
    store = PostgresChatSessionStore(database, ttl_seconds=3600)
    session = (await store.create_session("an")).session
    noon = datetime(2026, 3, 11, 12, tzinfo=UTC)
    answers = [
        new_message(role="assistant", created_at=noon, metadata={"processing_time_ms": 1235})
        for _ in range(6)
    ]
    await store.append(Append(session_id=session.session_id, messages=tuple(answers)))
    await count_all(database)

    shown = {
        cells: await on_a_terminal(
            tmp_path, database_url, "response_time_percentiles", *MARCH, "--granularity", "day", cells=cells
        )
        for cells in (88, 82)
    }

    # 3 answers, and 6.
    assert [shown[88].count(bar) for bar in ("█" * 5 + " " * 5, "█" * 10)] == [1, 1]
    assert "█" not in shown[82]
    assert "│ 2026-03-11 │ 6             │" in shown[82]


async def test_days_are_those_of_the_time_zone(call, recorded, database_url):
    zone = ("--timezone", "Asia/Ho_Chi_Minh", "--granularity", "day")

    done = await call(
        "traffic", "--from", "2026-03-12", "--to", "2026-03-13", *zone, database_url=database_url
    )

    assert done.stdout.splitlines()[1:] == ["2026-03-12\t0\t1\t1\t0"]


async def test_csv_has_no_formulas(call, recorded, database, database_url):
    store = PostgresChatSessionStore(database, ttl_seconds=3600)
    session = (await store.create_session("an")).session
    answer = new_message(
        "x",
        role="assistant",
        created_at=datetime(2026, 3, 10, tzinfo=UTC),
        metadata={"sources": ['=1+1,"a"']},
    )
    await store.append(Append(session_id=session.session_id, messages=(answer,)))

    done = await call("top_sources", *MARCH, "--csv", "--user", "an", database_url=database_url)

    assert '\'=1+1,""a""",1,1' in done.stdout


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (
            ("traffic", "--timezone", "Mars"),
            "error: there is no time zone 'Mars' (a name like Asia/Ho_Chi_Minh)\n",
        ),
        (
            ("session_outcomes", "--granularity", "hour"),
            "error: report session_outcomes is made of days (ask for day, week, or month)\n",
        ),
    ],
)
async def test_what_a_report_can_not_say_is_one_line(call, database, database_url, wrong, line):
    done = await call(*wrong, database_url=database_url)

    assert (done.exit_code, done.stdout, done.stderr) == (1, "", line)


async def test_what_is_not_counted_yet_is_said(call, database, database_url):
    done = await call("traffic", database_url=database_url)

    assert done.exit_code == 0
    assert done.stderr.startswith("not whole yet")


async def test_without_a_name_all_reports_are_listed(call):
    done = await call()

    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1:] == [f"{one.name}\t{one.definition}" for one in REPORTS.values()]


async def test_the_list_is_there_as_json(call):
    done = await call("--json")

    assert json.loads(done.stdout) == [
        {"name": one.name, "definition": one.definition} for one in REPORTS.values()
    ]


async def test_an_unknown_name_gets_the_names_and_status_2(call):
    done = await call("cost")

    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: there is no report 'cost'; there are {', '.join(REPORTS)} "
        "(`chat-sessions report` says what each is)\n"
    )


@pytest.mark.parametrize(
    "wrong", ["yesterday", "2026-02-30", "", "1969-12-31", "9999-01-01", "0001-01-01T00:00+14:00"]
)
async def test_what_is_no_time_is_refused_with_an_example(call, wrong):
    done = await call("response_time", "--from", wrong)

    assert (done.exit_code, done.stdout) == (2, "")
    assert "--from" in done.stderr
    assert "Traceback" not in done.stderr


async def test_a_range_the_wrong_way_round_is_one_line(call, database_url, database):
    backwards = ("--from", "2026-03-12", "--to", "2026-03-10")

    done = await call("response_time", *backwards, database_url=database_url)

    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == (
        "error: the range ends at 2026-03-10T00:00:00.000Z, which is not after its begin at "
        "2026-03-12T00:00:00.000Z (from must be earlier than to)\n"
    )


async def test_without_a_database_it_is_said_where_one_comes_from(call):
    done = await call("response_time")

    assert (done.exit_code, done.stdout) == (1, "")
    assert "DATABASE_URL is not set" in done.stderr
    assert "chat-sessions serve" in done.stderr
    assert done.stderr.count("\n") == 1


async def test_a_database_that_does_not_answer_is_one_line_without_the_password(call):
    done = await call("response_time", database_url=CLOSED_PORT)

    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("error: PostgreSQL can't be reached")
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr
