"""The data dictionary: every view of schema `analytics` with its columns, and every function, as the database itself
describes them.
"""

from itertools import groupby

from app.postgres.analysts import ANALYST_PII, TEXT_COLUMNS
from app.postgres.engine import Database

_COLUMNS = """
SELECT c.relname AS view, obj_description(c.oid, 'pg_class') AS what, a.attname AS column,
       format_type(a.atttypid, a.atttypmod) AS type, col_description(c.oid, a.attnum) AS meaning
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
WHERE c.relnamespace = 'analytics'::regnamespace AND c.relkind = 'v'
ORDER BY c.relname COLLATE "C", a.attnum
"""

_FUNCTIONS = """
SELECT p.proname AS function, pg_get_function_arguments(p.oid) AS arguments, pg_get_function_result(p.oid) AS result,
       obj_description(p.oid, 'pg_proc') AS what
FROM pg_proc p
WHERE p.pronamespace = 'analytics'::regnamespace
ORDER BY p.proname COLLATE "C", 2
"""

_HEAD = f"""# Data dictionary

Schema `analytics`, as `chat-sessions dictionary` prints it from a database. Views only gain columns.
Columns marked * hold what people wrote: of the analysts, only `{ANALYST_PII}` reads them.
"""


async def dictionary(database: Database) -> str:
    """A page of Markdown."""
    async with database.connection() as conn:
        records = await conn.fetch(_COLUMNS)
        functions = await conn.fetch(_FUNCTIONS)
    parts = [_HEAD]
    for (view, what), columns in groupby(records, key=lambda record: (record["view"], record["what"])):
        parts.append(f"\n## analytics.{view}\n\n{what}\n\n| column | type | meaning |\n|---|---|---|\n")
        for one in columns:
            mark = " *" if one["column"] in TEXT_COLUMNS.get(view, ()) else ""
            meaning = (one["meaning"] or "").replace("|", "\\|")
            parts.append(f"| `{one['column']}`{mark} | {one['type']} | {meaning} |\n")
    parts += [
        f"\n## analytics.{one['function']}({one['arguments']})\n\n{one['what']}\n\nReturns `{one['result']}`.\n"
        for one in functions
    ]
    return "".join(parts)
