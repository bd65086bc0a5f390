"""Accounts for people who write SQL against schema `analytics`, and may do nothing else.

Two roles hold the rights, an account is a member of one: `chat_analyst` reads every view but the columns with text,
`chat_analyst_pii` reads all. Roles are the whole server's, rights on the views each database's own.
"""

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import asyncpg

from app.errors import StartRefused
from app.postgres.engine import Database

ANALYST = "chat_analyst"
ANALYST_PII = "chat_analyst_pii"

#: What people wrote, and what programs noted beside it.
TEXT_COLUMNS: Mapping[str, frozenset[str]] = {
    "sessions": frozenset({"metadata"}),
    "messages": frozenset({"content", "metadata"}),
    "turns": frozenset({"question", "answer"}),
}

CONNECTIONS_MAX = 5

# Comfort, against mistakes: an analyst may change them. What guards the data is what is granted.
_SETTINGS = {
    "default_transaction_read_only": "on",
    "statement_timeout": "60s",
    "idle_in_transaction_session_timeout": "60s",
    "lock_timeout": "5s",
    "search_path": "analytics",
}

#: What sorts and joins of an analyst may put on disk. An analyst can't change it, nor can we where we are no superuser.
_TEMP_FILE_LIMIT = "1GB"

_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")

#: Others may change the same roles, from other databases.
_ATTEMPTS = 5
_CONCURRENTLY = {"XX000", "23505", "42710", "40001"}

_SCRAM_ITERATIONS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Analyst:
    """`password` is None for an account that was there already: it keeps its own. `limited` says whether the server
    let us bound what it puts on disk.
    """

    name: str
    role: str
    password: str | None
    limited: bool


async def add_analyst(database: Database, name: str, *, pii: bool) -> Analyst:
    """Makes the account, or gives an analyst that is there the rights of today's views. Safe to repeat.

    Raises `StartRefused` for a name that is no analyst's, and where our own account may not make others.
    """
    if not _NAME.fullmatch(name) or name.startswith("pg_") or name in {ANALYST, ANALYST_PII}:
        raise StartRefused(
            f"{name!r} is no name for an analyst",
            hint="up to 63 of a-z, 0-9 and _, not beginning with a digit or pg_",
        )
    for attempt in range(_ATTEMPTS):
        try:
            async with database.transaction() as conn:
                try:
                    return await _add(conn, name, ANALYST_PII if pii else ANALYST)
                except asyncpg.InsufficientPrivilegeError as exc:
                    raise StartRefused(
                        f"the account of DATABASE_URL may not do this: {exc}",
                        hint="run it once as an account with CREATEROLE that owns the database and its views",
                    ) from exc
        except asyncpg.PostgresError as exc:
            if exc.sqlstate not in _CONCURRENTLY or attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError


async def _add(conn: asyncpg.Connection, name: str, role: str) -> Analyst:
    await _make_roles(conn)
    await _grant(conn)
    is_there = await conn.fetchval("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", name)
    password = None
    if is_there:
        await _refuse_others(conn, name)
    else:
        password = secrets.token_urlsafe(24)
        # The server's log may have the statement: the password itself is not in it.
        await conn.execute(f"CREATE ROLE {name} LOGIN NOINHERIT PASSWORD '{_scram(password)}'")
    await conn.execute(f"ALTER ROLE {name} INHERIT CONNECTION LIMIT {CONNECTIONS_MAX}")
    for other in {ANALYST, ANALYST_PII} - {role}:
        await conn.execute(f"REVOKE {other} FROM {name}")
    await conn.execute(f"GRANT {role} TO {name}")
    for setting, value in _SETTINGS.items():
        await conn.execute(f"ALTER ROLE {name} SET {setting} = '{value}'")
    return Analyst(name=name, role=role, password=password, limited=await _limit_files(conn, name))


async def _make_roles(conn: asyncpg.Connection) -> None:
    there = {record[0] for record in await conn.fetch("SELECT rolname FROM pg_roles")}
    for role in (ANALYST, ANALYST_PII):
        if role not in there:
            await conn.execute(f"CREATE ROLE {role} NOLOGIN")


async def _grant(conn: asyncpg.Connection) -> None:
    records = await conn.fetch(
        "SELECT c.relname AS view, a.attname AS column FROM pg_class c "
        "JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped "
        "WHERE c.relnamespace = 'analytics'::regnamespace AND c.relkind = 'v' ORDER BY c.relname, a.attnum"
    )
    columns: dict[str, list[str]] = {}
    for record in records:
        columns.setdefault(record["view"], []).append(record["column"])
    database = await conn.fetchval("SELECT quote_ident(current_database())")
    await conn.execute(f"GRANT CONNECT ON DATABASE {database} TO {ANALYST}, {ANALYST_PII}")
    # By default everybody may fill the disk with temporary tables, which no limit bounds.
    await conn.execute(f"REVOKE TEMPORARY ON DATABASE {database} FROM PUBLIC")
    await conn.execute(f"GRANT USAGE ON SCHEMA analytics TO {ANALYST}, {ANALYST_PII}")
    await conn.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA analytics TO {ANALYST_PII}")
    # They read with the rights of who calls them: nothing but the views.
    await conn.execute(f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA analytics TO {ANALYST}, {ANALYST_PII}")
    for view, its_columns in columns.items():
        if text := TEXT_COLUMNS.get(view):
            granted = ", ".join(f'"{column}"' for column in its_columns if column not in text)
            await conn.execute(f'GRANT SELECT ({granted}) ON analytics."{view}" TO {ANALYST}')
        else:
            await conn.execute(f'GRANT SELECT ON analytics."{view}" TO {ANALYST}')


async def _refuse_others(conn: asyncpg.Connection, name: str) -> None:
    is_analyst = await conn.fetchval(
        "SELECT EXISTS (SELECT FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid "
        "JOIN pg_roles r ON r.oid = m.member WHERE r.rolname = $1 AND g.rolname = ANY($2::text[]))",
        name,
        [ANALYST, ANALYST_PII],
    )
    if not is_analyst:
        raise StartRefused(f"{name} is there already, and is no analyst", hint="choose another name")


async def _limit_files(conn: asyncpg.Connection, name: str) -> bool:
    await conn.execute("SAVEPOINT files")
    try:
        await conn.execute(f"ALTER ROLE {name} SET temp_file_limit = '{_TEMP_FILE_LIMIT}'")
    except asyncpg.InsufficientPrivilegeError:
        await conn.execute("ROLLBACK TO SAVEPOINT files")
        return False
    return True


def _scram(password: str) -> str:
    """What PostgreSQL keeps of a password (RFC 5802, RFC 7677)."""
    salt = secrets.token_bytes(16)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, _SCRAM_ITERATIONS)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    encoded = [base64.b64encode(part).decode() for part in (salt, stored, server)]
    return f"SCRAM-SHA-256${_SCRAM_ITERATIONS}:{encoded[0]}${encoded[1]}:{encoded[2]}"
