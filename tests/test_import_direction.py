"""Lower layers never import higher ones, siblings never meet, and each tool is used in one place.

The tables are the rule. A new part of `app` or a new dependency gets a line in them, or the test fails.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]

DOMAIN = {"chat", "errors", "store", "tasks", "batching"}

# part of app -> the other parts that it may import, from the lowest layer to the highest
MAY_IMPORT = {
    "chat": set(),
    "errors": set(),
    "strict_json": set(),
    "store": {"chat", "errors"},
    "tasks": set(),
    "batching": {"errors"},
    "coherence": DOMAIN,
    "hybrid": DOMAIN | {"coherence"},
    "postgres": DOMAIN | {"coherence"},
    "redis_sessions": DOMAIN | {"coherence"},
    # Redis is the truth in it: of PostgreSQL it knows no more than the hybrid store does.
    "redis_only": DOMAIN | {"coherence", "redis_sessions"},
    "live": DOMAIN | {"coherence"},
    # Looks after both sides, so it may know both.
    "maintenance": DOMAIN | {"coherence", "hybrid", "postgres", "redis_sessions"},
    "assistants": DOMAIN,
    "analytics": DOMAIN | {"postgres"},
    # Takes what the API would have taken, and reads what stands in Redis.
    "archive": DOMAIN | {"strict_json", "coherence", "postgres", "redis_sessions"},
    "embedded": set(),
    "settings": {"errors"},
    "wiring": DOMAIN
    | {"coherence", "hybrid", "redis_only", "live", "postgres", "redis_sessions", "maintenance"}
    | {"assistants", "analytics", "settings", "__init__"},
    "metrics": DOMAIN | {"analytics", "wiring"},
    "api": DOMAIN | {"strict_json", "analytics", "assistants", "settings", "wiring", "metrics", "__init__"},
    # For people to look at: what they see is what the API and the commands say.
    "web": DOMAIN
    | {"coherence", "postgres", "redis_sessions", "assistants", "analytics", "settings", "wiring", "metrics"}
    | {"api", "__init__"},
    "application": {"api", "web", "settings", "wiring", "__init__"},
    "cli": DOMAIN
    | {
        "coherence",
        "postgres",
        "redis_sessions",
        "maintenance",
        "analytics",
        "archive",
        "embedded",
        "settings",
        "wiring",
    }
    | {"api", "application"},
    "migrations": {"errors", "settings", "postgres"},
    "__init__": set(),
    "__main__": {"cli"},
}

# what is not ours -> the only files and folders that may import it
ONLY_IN = {
    "fastapi": {"app/api", "app/web", "app/application.py"},
    "starlette": {"app/api", "app/web", "app/application.py"},
    "jinja2": {"app/web"},
    "markupsafe": {"app/web"},
    "uvicorn": {"app/cli"},
    "uvloop": {"app/cli"},
    "typer": {"app/cli"},
    "rich": {"app/cli"},
    "pydantic": {"app/api", "app/web", "app/settings.py"},
    "pydantic_settings": {"app/settings.py"},
    "redis": {"app/redis_sessions"},
    "hiredis": {"app/redis_sessions"},
    "sqlalchemy": {"app/postgres", "app/analytics", "app/settings.py", "migrations"},
    "asyncpg": {"app/postgres", "app/analytics", "app/cli/doctor.py"},
    "pyarrow": {"app/archive/parquet.py"},
    "alembic": {"app/postgres/schema.py", "migrations"},
    "httpx": {"app/assistants/openai_compatible"},
    "prometheus_client": {"app/metrics.py"},
}

# what connects to something, or decides for the whole process -> where alone it may be called
CALLED_ONLY_IN = {
    "create_engine": {"app/wiring.py", "app/cli"},
    "create_async_engine": {"app/postgres/engine.py", "migrations"},
    "Database": {"app/wiring.py", "app/cli"},
    # The guide's own arguments make a RedisChatSessionStore with connections of its own.
    # The cache has a pool for each Redis that it has been bound to.
    "create_redis": {"app/wiring.py", "app/redis_sessions/store.py", "app/redis_sessions/cache.py"},
    "BoundedRedis": {"app/wiring.py", "app/redis_sessions/store.py", "app/redis_sessions/cache.py"},
    "RedisSessionCache": {"app/wiring.py"},
    "RedisChatSessionStore": {"app/wiring.py"},
    "PostgresChatSessionStore": {"app/wiring.py", "app/cli"},
    "HybridChatSessionStore": {"app/wiring.py"},
    "RedisOnlyChatSessionStore": {"app/wiring.py"},
    "LiveChatSessionStore": {"app/wiring.py"},
    "Lease": {"app/wiring.py"},
    "Heartbeat": {"app/wiring.py"},
    "PostgresStateKeeper": {"app/wiring.py"},
    # Who claims a database decides its mode.
    "claim_state": {"app/wiring.py"},
    "Auditor": {"app/wiring.py"},
    "Sampler": {"app/wiring.py"},
    "load_assistant": {"app/wiring.py"},
    "embedded_servers": {"app/cli"},
    "read_settings": {"app/settings.py", "app/cli"},
    "Settings": {"app/settings.py"},
}

# where the environment may be read; app/embedded.py looks for programs on PATH, as a shell does, and pyarrow is told
# its allocator there alone
ENVIRONMENT_IN = {"app/settings.py", "app/embedded.py", "app/archive/parquet.py"}
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.get_exec_path"}


@dataclass(frozen=True)
class Module:
    path: str  # from the project's folder, with slashes
    tree: ast.Module

    @property
    def part(self) -> str:
        top, *rest = self.path.removesuffix(".py").split("/")
        return rest[0] if top == "app" else top

    def is_in(self, places: set[str]) -> bool:
        return any(self.path == place or self.path.startswith(f"{place}/") for place in places)

    def imports(self) -> Iterator[str]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from (f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names)

    def calls(self) -> Iterator[str]:
        """The last part of the name of everything that is called."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                yield ast.unparse(node.func).rpartition(".")[2]

    def attributes(self) -> Iterator[str]:
        yield from (ast.unparse(node) for node in ast.walk(self.tree) if isinstance(node, ast.Attribute))


def modules(project: Path) -> list[Module]:
    paths = sorted(path for top in ("app", "migrations") for path in (project / top).rglob("*.py"))
    return [Module(path.relative_to(project).as_posix(), ast.parse(path.read_text())) for path in paths]


def violations(project: Path) -> list[str]:
    return [
        f"{module.path} {violation}"
        for module in modules(project)
        for check in (imported, called, environment)
        for violation in check(module)
    ]


def imported(module: Module) -> Iterator[str]:
    for name in module.imports():
        package, _, rest = name.partition(".")
        if package == "app":
            # `from app import name`: a part, or else a name of app/__init__.py
            target = rest.partition(".")[0]
            target = target if target in MAY_IMPORT else "__init__"
            if target not in MAY_IMPORT.get(module.part, set()) | {module.part}:
                yield f"imports {name}"
        elif package not in sys.stdlib_module_names and not module.is_in(ONLY_IN.get(package, set())):
            yield f"imports {name}"


def called(module: Module) -> Iterator[str]:
    for name in module.calls():
        if not module.is_in(CALLED_ONLY_IN.get(name, {module.path})):
            yield f"calls {name}"


def environment(module: Module) -> Iterator[str]:
    if not module.is_in(ENVIRONMENT_IN):
        yield from (
            f"reads {name}" for name in (*module.attributes(), *module.imports()) if name in ENVIRONMENT
        )


def test_every_import_call_and_look_at_the_environment_is_in_the_tables():
    assert violations(PROJECT) == []


def test_every_part_of_the_app_has_a_line_in_the_table_and_every_line_has_its_part():
    assert {module.part for module in modules(PROJECT)} == set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("path", "line", "violation"),
    [
        ("app/chat.py", "import pydantic", "imports pydantic"),
        ("app/chat.py", "from app.store import Append", "imports app.store.Append"),
        ("app/chat.py", "from app import settings", "imports app.settings"),
        ("app/chat.py", "from .store import Append", "imports .store.Append"),
        ("app/store.py", "def f():\n    import asyncpg", "imports asyncpg"),
        ("app/postgres/store.py", "from app.redis_sessions import keys", "imports app.redis_sessions.keys"),
        ("app/redis_sessions/cache.py", "import app.postgres.rows", "imports app.postgres.rows"),
        ("app/hybrid.py", "from app.postgres.engine import Database", "imports app.postgres.engine.Database"),
        ("app/postgres/store.py", "from app.settings import Settings", "imports app.settings.Settings"),
        ("app/coherence/lease.py", "import asyncpg", "imports asyncpg"),
        ("app/redis_only.py", "from app.postgres import store", "imports app.postgres.store"),
        ("app/redis_only.py", "from app.hybrid import log", "imports app.hybrid.log"),
        ("app/maintenance/modes.py", "from app.wiring import Stores", "imports app.wiring.Stores"),
        ("app/maintenance/modes.py", "from redis.asyncio import Redis", "imports redis.asyncio.Redis"),
        ("app/wiring.py", "from app.application import create_app", "imports app.application.create_app"),
        ("app/api/health.py", "from redis.asyncio import Redis", "imports redis.asyncio.Redis"),
        ("app/api/health.py", "from app.postgres import store", "imports app.postgres.store"),
        ("app/api/health.py", "from app.web import stores", "imports app.web.stores"),
        ("app/web/stores.py", "from redis.asyncio import Redis", "imports redis.asyncio.Redis"),
        ("app/web/stores.py", "from app.application import create_app", "imports app.application.create_app"),
        ("app/cli/show.py", "import sqlalchemy as sa", "imports sqlalchemy"),
        ("app/wiring.py", "from fastapi import FastAPI", "imports fastapi.FastAPI"),
        ("app/analytics/reports.py", "import pandas", "imports pandas"),
        ("app/service.py", "from app.chat import Message", "imports app.chat.Message"),
        ("app/application.py", "store = HybridChatSessionStore(a, b)", "calls HybridChatSessionStore"),
        ("app/application.py", "settings.read_settings()", "calls read_settings"),
        ("app/hybrid.py", "lease = Lease(seconds=2)", "calls Lease"),
        ("app/analytics/reports.py", "engine.create_engine('x')", "calls create_engine"),
        ("app/wiring.py", "import os\nos.environ['PORT']", "reads os.environ"),
        ("app/cli/serve.py", "from os import getenv", "reads os.getenv"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, path, line, violation):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(f"{line}\n")

    assert violations(tmp_path) == [f"{path} {violation}"]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("app/chat.py", "import json"),
        ("app/hybrid.py", "from app.coherence.ports import Entry"),
        ("app/postgres/store.py", "from app.postgres.engine import Database\nimport asyncpg"),
        ("app/application.py", "from app import __version__\nfrom fastapi import FastAPI"),
        ("app/wiring.py", "create_engine('x')"),
    ],
)
def test_what_the_tables_allow_is_no_violation(tmp_path, path, line):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(f"{line}\n")

    assert violations(tmp_path) == []
