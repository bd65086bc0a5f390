"""The guide's own script and commands, as they stand there, against `chat-sessions serve` in both modes.

The guide means localhost:8000 and localhost:6379. Programs on a PATH of this test's own lead to where the
service and Redis really listen, and stand in for curl, redis-cli, and jq where a machine has none.
"""

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from uuid import UUID

import pytest
from redis import Redis

from tests.integration.api_client import SESSIONS, empty_stores
from tests.integration.processes import PROJECT, eventually, serving

THE_GUIDES = PROJECT.parent / "shared" / "guide" / "test_sessions.sh"

IN_OUR_WORDS = """#!/bin/bash
API=http://localhost:8000/api/chat
echo "1. Make a session..."
ID=$(curl -s -X POST "$API/sessions?user_id=test" | jq -r '.session_id')
echo "   Session ID: $ID"
echo "2. Say hello..."
curl -s -X POST "$API/sessions/$ID/messages" -H "Content-Type: application/json" -d '{"message": "Hello!"}' | jq .
echo "3. Look into Redis..."
redis-cli -n 1 EXISTS "session:$ID"
redis-cli -n 1 TTL "session:$ID"
echo "4. Read it back..."
curl -s "$API/sessions/$ID/history" | jq .
echo "5. Delete it..."
curl -s -X DELETE "$API/sessions/$ID"
echo "6. Look again..."
redis-cli -n 1 EXISTS "session:$ID"
"""

SCRIPTS = {"in our words": IN_OUR_WORDS.encode()}
if THE_GUIDES.exists():
    SCRIPTS["the guide's"] = THE_GUIDES.read_bytes()

CURL = """#!{python}
import argparse, os, sys, urllib.error, urllib.request
arguments = [argument.replace("http://localhost:8000/", "{address}/") for argument in sys.argv[1:]]
if {program!r}:
    os.execv({program!r}, ["curl", "--noproxy", "*", *arguments])
parser = argparse.ArgumentParser()
parser.add_argument("-s", action="store_true")
parser.add_argument("-X", default="GET")
parser.add_argument("-H", action="append", default=[])
parser.add_argument("-d", type=os.fsencode)
parser.add_argument("url")
said = parser.parse_args(arguments)
headers = dict(line.split(": ", 1) for line in said.H)
request = urllib.request.Request(said.url, said.d, headers, method=said.X)
opener = urllib.request.build_opener(urllib.request.ProxyHandler({{}}))
try:
    answer = opener.open(request)
except urllib.error.HTTPError as exc:
    answer = exc
sys.stdout.buffer.write(answer.read())
"""

REDIS_CLI = """#!{python}
import os, shlex, sys
if {program!r}:
    os.execv({program!r}, ["redis-cli", "-u", {redis_url!r}, *sys.argv[1:]])
from redis import Redis, RedisError
arguments = sys.argv[1:]
database = arguments[1] if arguments[:1] == ["-n"] else "0"
arguments = arguments[2:] if arguments[:1] == ["-n"] else arguments
connection = Redis.from_url({redis_url!r}, db=int(database), protocol=2).connection_pool.get_connection()


def show(answer):
    lines = answer if isinstance(answer, list) else [b"" if answer is None else answer]
    for line in lines:
        text = line if isinstance(line, bytes) else str(line).encode()
        sys.stdout.buffer.write(text + b"\\n")
    sys.stdout.flush()


for command in [arguments] if arguments else map(shlex.split, sys.stdin):
    connection.send_command(*command)
    try:
        show(connection.read_response())
        while command[0] == "MONITOR":
            show(connection.read_response(timeout=None))
    except RedisError as exc:
        show(str(exc))
"""

JQ = """#!{python}
import json, os, sys
if {program!r}:
    os.execv({program!r}, ["jq", *sys.argv[1:]])
value = json.load(sys.stdin)
for name in sys.argv[-1].strip(".").split("."):
    value = value[name] if name else value
plain = "-r" in sys.argv and isinstance(value, str)
print(value if plain else json.dumps(value, indent=2, ensure_ascii=False))
"""

PYTHON = """#!/bin/sh
exec {python} "$@"
"""


@pytest.fixture(scope="module", params=["hybrid", "redis-only"])
def mode(request):
    return request.param


@pytest.fixture(scope="module")
async def stores(servers, database_url):
    return await empty_stores(servers, database_url)


@pytest.fixture(scope="module")
def service(stores, mode, tmp_path_factory):
    urls = {
        "hybrid": {"DATABASE_URL": stores.database_url, "REDIS_URL": stores.redis_url},
        "redis-only": {"REDIS_URL": stores.redis_url, "REDIS_ONLY_MODE": "true"},
    }[mode]
    with serving(tmp_path_factory.mktemp("service"), **urls) as service:
        yield service


@pytest.fixture(scope="module")
def programs(service, stores, tmp_path_factory):
    """What the guide's commands call."""
    folder = tmp_path_factory.mktemp("programs")
    for name, text in {"curl": CURL, "redis-cli": REDIS_CLI, "jq": JQ, "python": PYTHON}.items():
        program = folder / name
        program.write_text(
            text.format(
                python=sys.executable,
                program=shutil.which(name),
                address=service.address,
                redis_url=stores.redis_url,
            )
        )
        program.chmod(0o755)
    return folder


@pytest.fixture
def shell(programs, tmp_path):
    """Runs a command as the guide has it; gives what it prints."""

    def run(command, *, stdin=""):
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env=environment(programs),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    return run


@pytest.fixture
def client(service):
    with service.client() as client:
        yield client


@pytest.fixture
def redis(stores):
    with Redis.from_url(stores.redis_url, db=1, decode_responses=True) as redis:
        yield redis


@pytest.fixture
def as_it_was(redis):
    """Restores what the guide's advice for a full Redis changes."""
    before = redis.config_get("maxmemory*")
    yield
    for name in ("maxmemory", "maxmemory-policy"):
        redis.config_set(name, before[name])


def environment(programs):
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(PROJECT),
        "PYTHONUTF8": "1",
        "LC_ALL": "C.UTF-8",
    }


def new_session(client, *contents):
    """The id of a session with these messages."""
    session_id = client.post(SESSIONS, params={"user_id": "user123"}).json()["session_id"]
    for content in contents:
        answer = client.post(f"{SESSIONS}/{session_id}/messages", json={"message": content})
        assert answer.status_code == 200, answer.text
    return session_id


def history(client, session_id):
    return client.get(f"{SESSIONS}/{session_id}/history")


def steps(printed):
    """What the script prints in each of its six steps; the answer to its DELETE ends without a line break."""
    before, *parts = re.split(r"(?m)(?:^|(?<=\}))[1-6]\. [A-Z][A-Za-z ]+\.\.\.\n", printed)
    assert (before, len(parts)) == ("", 6), printed
    return parts


def lines_until(terminal, wanted):
    """What a terminal shows up to and with a line that holds the text."""
    shown, deadline = b"", time.monotonic() + 20
    while wanted.encode() not in shown or not shown.endswith(b"\n"):
        assert time.monotonic() < deadline, shown
        ready, _, _ = select.select([terminal], [], [], 0.1)
        shown += b"".join(os.read(one, 65536) for one in ready)
    return shown.decode().splitlines()


class TestTheScript:
    @pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
    def test_its_six_steps_have_their_results(self, shell, script, tmp_path):
        (tmp_path / "test_sessions.sh").write_bytes(script)
        created, said, in_redis, read, deleted, gone = steps(shell("bash test_sessions.sh"))
        session_id = created.removeprefix("   Session ID: ").removesuffix("\n")
        assert str(UUID(session_id)) == session_id
        said = json.loads(said)
        assert set(said) == {
            "session_id",
            "user_message",
            "assistant_response",
            "sources",
            "processing_time_ms",
        }
        assert (said["session_id"], said["user_message"]) == (session_id, "Hello!")
        assert said["assistant_response"]
        exists, ttl = in_redis.splitlines()
        assert exists == "1"
        assert 1 <= int(ttl) <= 3600
        read = json.loads(read)
        assert (read["session_id"], read["total_messages"]) == (session_id, 2)
        assert [(message["role"], message["content"]) for message in read["messages"]] == [
            ("user", "Hello!"),
            ("assistant", said["assistant_response"]),
        ]
        assert json.loads(deleted) == {"message": f"Session {session_id} deleted"}
        assert gone == "0\n"

    def test_the_multi_turn_example_tells_the_whole_conversation(self, shell):
        printed = shell("""
SESSION_ID=$(curl -s -X POST "http://localhost:8000/api/chat/sessions?user_id=user123" | jq -r '.session_id')
echo "Session created: $SESSION_ID"
curl -s -X POST "http://localhost:8000/api/chat/sessions/$SESSION_ID/messages" \\
  -H "Content-Type: application/json" \\
  -d '{"message": "Điều kiện tham gia đấu thầu?"}'
echo
curl -s -X POST "http://localhost:8000/api/chat/sessions/$SESSION_ID/messages" \\
  -H "Content-Type: application/json" \\
  -d '{"message": "Giải thích rõ hơn về điều kiện tài chính"}'
echo
curl -s "http://localhost:8000/api/chat/sessions/$SESSION_ID/history" | jq .
curl -s -X DELETE "http://localhost:8000/api/chat/sessions/$SESSION_ID"
""")
        created, first, second, rest = printed.split("\n", 3)
        session_id = created.removeprefix("Session created: ")
        conversation, end = json.JSONDecoder().raw_decode(rest)
        assert [message["content"] for message in conversation["messages"]] == [
            "Điều kiện tham gia đấu thầu?",
            json.loads(first)["assistant_response"],
            "Giải thích rõ hơn về điều kiện tài chính",
            json.loads(second)["assistant_response"],
        ]
        assert json.loads(rest[end:]) == {"message": f"Session {session_id} deleted"}


class TestLookingIntoRedis:
    def test_the_interactive_commands_tell_of_the_session(self, shell, client, redis):
        redis.flushdb()
        session_id = new_session(client, "Xin chào")
        key = f"session:{session_id}"
        *answers, last = shell(
            "redis-cli -n 1",
            stdin=f"KEYS session:*\nTTL {key}\nDBSIZE\nDEL {key}\nTTL {key}\nEXISTS {key}\nFLUSHDB\n",
        ).splitlines()
        assert answers[0] == key
        assert 3590 <= int(answers[1]) <= 3600
        assert answers[2:] == ["1", "1", "-2", "0"]
        assert last == "OK"

    def test_get_is_json_with_the_fields_of_the_guide(self, shell, client):
        session_id = new_session(client, "Điều kiện tham gia đấu thầu?")
        value = json.loads(shell(f'redis-cli -n 1 GET "session:{session_id}" | python -m json.tool'))
        assert {"session_id", "user_id", "created_at", "last_activity", "messages"} <= set(value)
        assert (value["session_id"], value["user_id"]) == (session_id, "user123")
        question, answer = value["messages"]
        assert question == history(client, session_id).json()["messages"][0]
        assert (question["role"], question["content"]) == ("user", "Điều kiện tham gia đấu thầu?")
        assert {"role", "content", "timestamp", "metadata"} <= set(answer)
        assert set(answer["metadata"]) == {"sources", "processing_time_ms"}

    def test_ttl_slides_with_every_use(self, shell, client, redis):
        session_id = new_session(client)
        for use in ("history", ""):
            redis.expire(f"session:{session_id}", 100)
            assert client.get(f"{SESSIONS}/{session_id}/{use}".rstrip("/")).status_code == 200
            assert int(shell(f"redis-cli -n 1 TTL session:{session_id}")) > 3590
        redis.expire(f"session:{session_id}", 100)
        client.post(f"{SESSIONS}/{session_id}/messages", json={"message": "Xin chào"})
        assert int(shell(f"redis-cli -n 1 TTL session:{session_id}")) > 3590

    def test_dbsize_is_the_number_of_sessions(self, shell, client, redis):
        redis.flushdb()
        for _ in range(3):
            new_session(client, "Xin chào")
        assert shell("redis-cli -n 1 DBSIZE") == "3\n"

    def test_info_tells_the_memory(self, shell):
        printed = shell("redis-cli -n 1 INFO memory | grep used_memory_human")
        assert re.fullmatch(r"used_memory_human:[0-9.]+[KMG]\s*", printed)

    def test_the_export_loop_writes_every_session_whole(self, shell, client, redis, tmp_path):
        redis.flushdb()
        sessions = {
            new_session(client, "Xin chào", "\n\nhai"),
            new_session(client, "đấu thầu"),
            new_session(client),
        }
        shell("""
redis-cli -n 1 KEYS "session:*" > session_keys.txt

while read key; do
  redis-cli -n 1 GET "$key" >> sessions_backup.json
  echo "" >> sessions_backup.json
done < session_keys.txt
""")
        keys = (tmp_path / "session_keys.txt").read_text().splitlines()
        backup = (tmp_path / "sessions_backup.json").read_text()
        assert backup.endswith("\n\n")
        # A session has a line for each message; an empty line parts it from the next, as the loop has it.
        exported = [json.loads(session) for session in backup.removesuffix("\n\n").split("\n\n")]
        assert {f"session:{session_id}" for session_id in sessions} == set(keys)
        assert [f"session:{session['session_id']}" for session in exported] == keys
        for session in exported:
            assert session["messages"] == history(client, session["session_id"]).json()["messages"]

    def test_monitor_shows_a_session_as_it_is_created(self, programs, tmp_path, client, redis):
        def watchers():
            return [one["id"] for one in redis.client_list() if "O" in one["flags"]]

        ours, theirs = pty.openpty()
        with subprocess.Popen(
            ["bash", "-c", "redis-cli -n 1 MONITOR | grep session"],
            cwd=tmp_path,
            env=environment(programs),
            stdin=subprocess.DEVNULL,
            # On a terminal grep prints each line as it comes.
            stdout=theirs,
        ) as monitor:
            try:
                [watcher] = eventually(watchers)
                session_id = new_session(client)
                [*_, line] = lines_until(ours, session_id)
                assert re.match(r"\d+\.\d+ \[1 ", line)
                redis.client_kill_filter(_id=watcher)
                assert monitor.wait(10) == 0
            finally:
                monitor.kill()
                os.close(theirs)
                os.close(ours)
        assert eventually(lambda: not watchers())


class TestWhenRedisIsShortOfMemory:
    def test_its_limits_change_while_serving(self, shell, client, redis, as_it_was):
        session_id = new_session(client, "Xin chào")
        assert shell("redis-cli CONFIG SET maxmemory 1gb") == "OK\n"
        assert shell("redis-cli CONFIG SET maxmemory-policy volatile-ttl") == "OK\n"
        assert redis.config_get("maxmemory*")["maxmemory-policy"] == "volatile-ttl"
        answer = client.post(f"{SESSIONS}/{session_id}/messages", json={"message": "hai"})
        assert answer.status_code == 200
        assert history(client, session_id).json()["total_messages"] == 4
        assert history(client, new_session(client)).json()["total_messages"] == 0
        assert client.get("/health/ready").json()["status"] == "pass"


@pytest.mark.parametrize("command", ["redis-cli -n 1 DEL session:{session_id}", "redis-cli -n 1 FLUSHDB"])
class TestWhatIsTakenFromRedis:
    @pytest.mark.parametrize("mode", ["hybrid"], indirect=True)
    def test_is_still_answered_in_hybrid_mode_and_comes_back(self, shell, client, command):
        session_id = new_session(client, "Xin chào")
        before = history(client, session_id)
        shell(command.format(session_id=session_id))
        assert shell(f"redis-cli -n 1 EXISTS session:{session_id}") == "0\n"
        after = history(client, session_id)
        assert (after.status_code, after.content) == (200, before.content)
        assert after.headers["x-session-source"] == "postgres"
        assert shell(f"redis-cli -n 1 EXISTS session:{session_id}") == "1\n"
        assert history(client, session_id).headers["x-session-source"] == "redis"

    @pytest.mark.parametrize("mode", ["redis-only"], indirect=True)
    def test_is_gone_in_redis_only_mode(self, shell, client, command):
        session_id = new_session(client, "Xin chào")
        shell(command.format(session_id=session_id))
        for answer in (history(client, session_id), client.get(f"{SESSIONS}/{session_id}")):
            assert answer.status_code == 404
            assert answer.json()["detail"] == "Session not found"
        assert session_id not in client.get(SESSIONS, params={"user_id": "user123"}).text
