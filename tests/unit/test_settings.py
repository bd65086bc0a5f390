"""What the settings take, what they refuse, and where they are described."""

import re
from pathlib import Path

import pytest

from app.errors import StartRefused
from app.postgres.engine import sqlalchemy_url
from app.settings import Settings, migration_database_url, read_settings

PROJECT = Path(__file__).parents[2]

NAMES = {name.upper() for name in Settings.model_fields}


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch, tmp_path):
    """No setting in the environment, and a working folder without .env."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def refusal() -> str:
    with pytest.raises(StartRefused) as refused:
        read_settings()
    return str(refused.value)


def test_the_defaults_are_the_guides():
    settings = read_settings()

    assert settings.enable_redis_sessions is True
    assert settings.session_ttl_seconds == 3600
    assert settings.session_max_messages == 100
    assert settings.redis_db_sessions == 1


def test_without_settings_both_servers_are_embedded_and_only_this_machine_is_served():
    settings = read_settings()

    assert (settings.database_url, settings.redis_url, settings.redis_only_mode) == (None, None, None)
    assert (settings.host, settings.port, settings.data_dir) == ("127.0.0.1", 8000, Path(".data"))


def test_a_value_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("SESSION_TTL_SECONDS", "60")
    monkeypatch.setenv("redis_only_mode", "true")

    settings = read_settings()

    assert (settings.session_ttl_seconds, settings.redis_only_mode) == (60, True)


def test_a_value_comes_from_env_in_the_working_folder(tmp_path):
    (tmp_path / ".env").write_text(
        "# a comment\nSESSION_MAX_MESSAGES=7\nOPENAI_SYSTEM_PROMPT='Hãy trả lời ngắn.'\n"
    )

    settings = read_settings()

    assert (settings.session_max_messages, settings.openai_system_prompt) == (7, "Hãy trả lời ngắn.")


def test_the_environment_wins_over_env(monkeypatch, tmp_path):
    (tmp_path / ".env").write_text("PORT=1111\nDATABASE_URL=postgresql://one\n")
    monkeypatch.setenv("PORT", "2222")
    monkeypatch.setenv("DATABASE_URL", "")

    settings = read_settings()

    assert (settings.port, settings.database_url) == (2222, None)


def test_names_in_env_that_are_no_settings_are_left_alone(tmp_path):
    (tmp_path / ".env").write_text("POSTGRES_PASSWORD=change-me\n")

    assert read_settings() == Settings(_env_file=None)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_an_empty_value_means_unset(monkeypatch, tmp_path, name):
    monkeypatch.setenv(name, "")
    (tmp_path / ".env").write_text("".join(f"{other}=\n" for other in NAMES))

    assert read_settings() == Settings.model_construct()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:p@h/d",
        "postgresql+asyncpg://u:p@[::1]:5432/d",
        "postgresql://u:p/#?@h:1/d",
        "postgresql://u@server:p%40@máy-chủ/d",
    ],
)
def test_postgresqls_urls_are_taken(monkeypatch, url):
    monkeypatch.setenv("DATABASE_URL", url)

    assert read_settings().database_url == url


@pytest.mark.parametrize("url", ["redis://h", "rediss://:p@h:6380/0", "unix:///run/redis.sock"])
def test_rediss_urls_are_taken(monkeypatch, url):
    monkeypatch.setenv("REDIS_URL", url)

    assert read_settings().redis_url == url


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("ENABLE_REDIS_SESSIONS", "maybe", "should be true or false"),
        ("REDIS_ONLY_MODE", "2", "should be true or false"),
        ("PORT", "http", "should be a whole number"),
        ("SESSION_TTL_SECONDS", "0.5", "should be a whole number"),
        ("SESSION_TTL_SECONDS", "0", "greater than or equal to 1"),
        ("SESSION_MAX_MESSAGES", "10001", "less than or equal to 10000"),
        ("REDIS_DB_SESSIONS", "-1", "greater than or equal to 0"),
        ("PORT", "65536", "less than or equal to 65535"),
        ("ASSISTANT_TIMEOUT_SECONDS", "soon", "should be a number"),
        ("ASSISTANT_TIMEOUT_SECONDS", "nan", "should be less than or equal to 3600"),
        ("ASSISTANT_TIMEOUT_SECONDS", "inf", "less than or equal to 3600"),
        ("LOG_LEVEL", "loud", "'debug', 'info', 'warning' or 'error'"),
        ("DATABASE_POOLER", "session", "'none' or 'transaction'"),
        ("CACHE_VERIFY", "never", "'always'"),
        ("PG_OUTAGE_READS", "yes", "'serve' or 'refuse'"),
        ("USER_ID_CHARACTERS_MAX", "257", "less than or equal to 256"),
    ],
)
def test_a_wrong_value_stops_the_start_with_name_value_and_what_would_be_right(
    monkeypatch, name, value, right
):
    monkeypatch.setenv(name, value)

    message = refusal()

    assert message.startswith(f"{name}={value}: ")
    assert right in message
    assert "\n" not in message


def test_every_wrong_value_is_named_on_a_line_of_its_own(monkeypatch):
    monkeypatch.setenv("PORT", "http")
    monkeypatch.setenv("LOG_LEVEL", "loud")

    assert [line.partition("=")[0] for line in refusal().splitlines()] == ["PORT", "LOG_LEVEL"]


_ESCAPED = "should be postgresql://user:password@host:5432/database, with %40 for an @ in the password"


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        (
            "DATABASE_URL",
            "mysql://chat:sesame@h/d",
            "should be postgresql://user:password@host:5432/database",
        ),
        ("DATABASE_URL", "postgresql://chat:sesame@h:port/d", "should be postgresql://"),
        ("DATABASE_URL", "postgresql://chat:sesame@[::1/d", "should be postgresql://"),
        ("DATABASE_URL", "postgresql://chat:sesame@h:99999/d", "should be postgresql://"),
        ("DATABASE_URL", "sesame", "should be postgresql://"),
        ("DATABASE_URL", "postgresql://chat:sesame@h..example/d", "should be postgresql://"),
        ("DATABASE_URL", f"postgresql://chat:sesame@{'h' * 64}/d", "should be postgresql://"),
        ("DATABASE_URL", "postgresql://chat:sesame\udcff@h/d", "should be postgresql://"),
        ("DATABASE_URL", "postgresql://chat:sesame@@h/d", _ESCAPED),
        ("DATABASE_URL", "postgresql://chat:sesame@a:b/@h/d", _ESCAPED),
        ("REDIS_URL", "http://:sesame@h", "should be redis://host:6379"),
        ("REDIS_URL", "redis://:sesame@h:port", "should be redis://host:6379"),
        ("REDIS_URL", "redis://:sesame@[::1", "should be redis://host:6379"),
        ("REDIS_URL", "sesame", "should be redis://host:6379"),
    ],
)
def test_a_wrong_url_is_named_and_described_but_never_shown(monkeypatch, name, value, right):
    monkeypatch.setenv(name, value)

    message = refusal()

    assert message.startswith(f"{name}: {right}")
    assert "sesame" not in message


def test_settings_print_without_urls_and_keys(monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgresql://chat:sesame@h/d")
    monkeypatch.setenv("REDIS_URL", "redis://:sesame@h")
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")

    shown = repr(read_settings())

    assert "session_ttl_seconds=3600" in shown
    assert "sesame" not in shown


def test_redis_only_without_redis_is_refused_and_names_both_flags(monkeypatch):
    monkeypatch.setenv("ENABLE_REDIS_SESSIONS", "false")
    monkeypatch.setenv("REDIS_ONLY_MODE", "true")

    assert refusal() == (
        "REDIS_ONLY_MODE=true needs Redis, and ENABLE_REDIS_SESSIONS=false takes it away: set one of them"
    )


def test_sessions_and_everything_else_need_two_databases_of_redis(monkeypatch):
    monkeypatch.setenv("REDIS_DB_SESSIONS", "2")

    assert refusal().startswith("REDIS_DB_SESSIONS and REDIS_DB_AUX are both 2: ")


def test_an_env_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / ".env").write_bytes(b"PORT=\xff\n")

    assert refusal().startswith(".env can't be read: ")


def test_a_migration_without_a_database_is_refused_and_says_what_to_export():
    with pytest.raises(StartRefused, match=r"^DATABASE_URL is not set \(export DATABASE_URL=postgresql://"):
        migration_database_url()


def test_a_migration_goes_where_the_settings_say(tmp_path):
    (tmp_path / ".env").write_text("DATABASE_URL=postgresql://u:p@h/d\n")

    assert migration_database_url() == "postgresql://u:p@h/d"


def test_the_readme_lists_every_setting_with_its_default_and_meaning():
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `([A-Z][A-Z_]+)` \| (.+ \| .+) \|$", readme, re.MULTILINE))

    assert listed == {
        name.upper(): f"{in_readme(field.default)} | {field.description}"
        for name, field in Settings.model_fields.items()
    }


def in_readme(default: object) -> str:
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return "unset" if default is None else f"`{default}`"


def test_the_example_file_names_only_settings_and_what_compose_reads():
    example, _, for_compose = (
        (PROJECT / ".env.example").read_text(encoding="utf-8").partition("`docker compose")
    )
    compose = (PROJECT / "docker-compose.yml").read_text(encoding="utf-8")

    assert names_in(example) <= NAMES
    assert "DATABASE_URL" in names_in(example)
    assert names_in(for_compose) <= set(re.findall(r"\$\{([A-Z_]+)", compose))
    assert "POSTGRES_PASSWORD" in names_in(for_compose)


def test_the_example_file_can_be_used_as_it_is(tmp_path):
    (tmp_path / ".env").write_text((PROJECT / ".env.example").read_text(encoding="utf-8"), encoding="utf-8")

    assert read_settings() == Settings(_env_file=None)


def names_in(example: str) -> set[str]:
    return set(re.findall(r"^(?:# )?([A-Z][A-Z_]+)=", example, re.MULTILINE))


@pytest.mark.parametrize(
    ("name", "url", "parameter"),
    [
        (
            "DATABASE_URL",
            "postgresql://u:secret@h/d?sslmode=require&channel_binding=require",
            "channel_binding",
        ),
        ("REDIS_URL", "redis://:secret@h:6379?foo=1", "foo"),
    ],
)
def test_a_parameter_that_no_driver_knows_stops_the_start_by_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, url: str, parameter: str
) -> None:
    monkeypatch.setenv(name, url)

    with pytest.raises(StartRefused) as refused:
        read_settings(_env_file=None)

    assert f"{name}: has the parameter {parameter}" in str(refused.value)
    assert "secret" not in str(refused.value)


def test_sslmode_of_hosted_databases_is_what_the_driver_calls_ssl() -> None:
    url = sqlalchemy_url("postgresql://u:p@h/d?sslmode=require")

    assert url == "postgresql+asyncpg://u:p@h/d?ssl=require"
