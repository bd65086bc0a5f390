"""The hot statements, over arrays: a batch of writes is one round trip a step, a single write a batch of one.

A write runs them as separate statements of one transaction, in this order: one statement that locks and
reads would see the rows as they were before it waited for the lock (a mixed snapshot).

A plan is made once a connection, perhaps of empty tables, and stays while they grow. So a table is named with what its
index finds (`= ANY`) also where a join says it once more: else all of a small table is read, and then all of a large one.
"""

_STATE = "c.protocol, c.epoch, c.mode, c.cache, c.redis_identity, c.settled"

_SESSION = "session_id, user_id, created_at, last_activity, message_count, chain, owner"

# In the order of the ids: an UPDATE ... FROM unnest locks in the order of its plan, and two of them deadlock.
LOCK_SESSIONS = f"""
SELECT {_SESSION} FROM chat.chat_sessions
WHERE session_id = ANY($1::uuid[]) ORDER BY session_id FOR NO KEY UPDATE
"""

# The same, without those that somebody else has locked: a batch waits for nobody.
LOCK_FREE_SESSIONS = LOCK_SESSIONS.rstrip() + " SKIP LOCKED\n"

# Of those that were not locked: which are there, and only somebody else's now.
SESSIONS_THERE = "SELECT session_id FROM chat.chat_sessions WHERE session_id = ANY($1::uuid[])"

LOCK_SESSION_FOR_DELETE = f"""
SELECT {_SESSION} FROM chat.chat_sessions WHERE session_id = $1 FOR UPDATE
"""

# After the lock, where no message of the writes can be stored already: their ids are new. The join below is
# planned anew at every execution, which costs more than it saves in looking.
STATE = f"SELECT {_STATE} FROM chat.cache_state c WHERE id = 1"

# After the lock: the state of the cache, and which of the writes' messages are stored already.
STATE_AND_STORED = f"""
SELECT {_STATE},
       m.session_id, m.message_id, m.seq, m.request_digest, m.request_size
FROM chat.cache_state c
LEFT JOIN (
    unnest($1::uuid[], $2::date[], $3::uuid[]) AS w(session_id, session_month, message_id)
    JOIN chat.chat_messages m USING (session_id, session_month, message_id)
) ON m.session_id = ANY($1) AND m.session_month = ANY($2)
WHERE c.id = 1
"""

# Says the state of the cache, too: it begins after the lock, so it sees every epoch that a reader may have stamped
# under it, and a round trip of its own is saved.
APPEND = f"""
WITH head AS (
    UPDATE chat.chat_sessions s
    SET message_count = w.message_count, chain = w.chain, last_activity = w.last_activity
    FROM unnest($1::uuid[], $2::int[], $3::bytea[], $4::timestamptz[])
        AS w(session_id, message_count, chain, last_activity)
    WHERE s.session_id = w.session_id AND s.session_id = ANY($1)
), messages AS (
    INSERT INTO chat.chat_messages (session_id, session_month, seq, message_id, role, content, created_at,
        processing_time_ms, source_count, metadata, request_digest, request_size)
    SELECT * FROM unnest($5::uuid[], $6::date[], $7::int[], $8::uuid[], $9::text[], $10::text[],
        $11::timestamptz[], $12::int[], $13::smallint[], $14::json[], $15::bytea[], $16::smallint[])
)
SELECT {_STATE} FROM chat.cache_state c WHERE id = 1
"""

# Returns the state beside it: no lock is needed, nobody else can see the session yet.
CREATE = f"""
WITH created AS (
    INSERT INTO chat.chat_sessions (session_id, user_id, created_at, last_activity, owner)
    SELECT w.session_id, w.user_id, w.created_at, w.created_at, w.owner
    FROM unnest($1::uuid[], $2::text[], $3::timestamptz[], $4::text[])
        AS w(session_id, user_id, created_at, owner)
)
SELECT {_STATE} FROM chat.cache_state c WHERE id = 1
"""

# A session that Redis held alone, and owns until its entry there is replaced.
INSERT_UNLESS_THERE = """
INSERT INTO chat.chat_sessions (session_id, user_id, created_at, last_activity, owner)
VALUES ($1, $2, $3, $4, 'redis') ON CONFLICT ON CONSTRAINT chat_sessions_pkey DO NOTHING
"""

# Out of files, in the order of the ids: two that do so at once wait for each other, and never both.
RESTORE = """
INSERT INTO chat.chat_sessions (session_id, user_id, created_at, last_activity, metadata)
SELECT * FROM unnest($1::uuid[], $2::text[], $3::timestamptz[], $4::timestamptz[], $5::json[])
ON CONFLICT ON CONSTRAINT chat_sessions_pkey DO NOTHING
"""

SESSIONS = f"SELECT {_SESSION} FROM chat.chat_sessions WHERE session_id = ANY($1::uuid[])"

# Ids by seq: whether a stretch of a history is the stored one.
IDS = """
SELECT message_id FROM chat.chat_messages
WHERE session_id = $1 AND session_month = $2 AND seq BETWEEN $3 AND $4 ORDER BY seq
"""

OWNED_BY_REDIS = "SELECT session_id FROM chat.chat_sessions WHERE user_id = $1 AND owner = 'redis'"

# A page of all that Redis owns, by id.
PAGE_OWNED_BY_REDIS = """
SELECT session_id FROM chat.chat_sessions WHERE owner = 'redis' AND session_id > $1 ORDER BY session_id LIMIT $2
"""

GIVE_TO = "UPDATE chat.chat_sessions SET owner = $2 WHERE session_id = $1"

# The look-up beside a cached read: the row and the state as one snapshot sees them. Always one row.
LOOKUP = f"""
SELECT {_STATE},
       s.session_id, s.user_id, s.created_at, s.last_activity, s.message_count, s.chain, s.owner
FROM chat.cache_state c LEFT JOIN chat.chat_sessions s ON s.session_id = $1
WHERE c.id = 1
"""

# As text: the driver would decode JSON, and a number or the order of keys might not come back as it was.
_MESSAGE = (
    "message_id, seq, role, content, created_at, metadata::text AS metadata, request_digest, request_size"
)

# `seq BETWEEN` serves any page from the primary key of one partition.
MESSAGES = f"""
SELECT {_MESSAGE} FROM chat.chat_messages
WHERE session_id = $1 AND session_month = $2 AND seq BETWEEN $3 AND $4 ORDER BY seq
"""

MESSAGES_BY_ID = f"""
SELECT {_MESSAGE} FROM chat.chat_messages
WHERE session_id = $1 AND session_month = $2 AND message_id = ANY($3::uuid[])
"""

# The row and its newest messages in one snapshot: a page read without a cache needs no lock.
HISTORY = f"""
SELECT s.session_id, s.user_id, s.created_at AS session_created_at, s.last_activity, s.message_count,
       s.chain, s.owner, m.*
FROM chat.chat_sessions s
LEFT JOIN LATERAL (
    SELECT {_MESSAGE} FROM chat.chat_messages
    WHERE session_id = $1 AND session_month = $2
      AND seq > least(s.message_count, $3::int - 1) - $4::int
      AND seq <= least(s.message_count, $3::int - 1)
) m ON true
WHERE s.session_id = $1 ORDER BY m.seq
"""

# Under the session's row lock, which whoever takes or ends a turn holds: it needs no lock of its own. Who gives one up
# deletes it by his token, which is no longer there once another has taken it.
TURN = """
SELECT token, leased_until > clock_timestamp() AS held,
       extract(epoch FROM leased_until - clock_timestamp())::float8 AS left_seconds
FROM chat.chat_turns WHERE session_id = $1 AND message_id = $2
"""

HOLD_TURNS = """
INSERT INTO chat.chat_turns (session_id, message_id, token, leased_until)
SELECT w.session_id, w.message_id, w.token, clock_timestamp() + make_interval(secs => w.lease_seconds)
FROM unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::float8[]) AS w(session_id, message_id, token, lease_seconds)
ON CONFLICT ON CONSTRAINT chat_turns_pkey DO UPDATE
SET token = excluded.token, leased_until = excluded.leased_until
"""

RELEASE_TURNS = """
DELETE FROM chat.chat_turns t
USING unnest($1::uuid[], $2::uuid[], $3::uuid[]) AS w(session_id, message_id, token)
WHERE t.session_id = w.session_id AND t.message_id = w.message_id AND t.token = w.token AND t.session_id = ANY($1)
RETURNING t.session_id
"""

DELETE_MESSAGES = "DELETE FROM chat.chat_messages WHERE session_id = $1 AND session_month = $2"
DELETE_TURNS = "DELETE FROM chat.chat_turns WHERE session_id = $1"
DELETE_SESSION = "DELETE FROM chat.chat_sessions WHERE session_id = $1"

# The pulse. On the primary the timeline is that of the log it writes; on a standby nobody may ask for that.
HEARTBEAT = f"""
SELECT {_STATE}, pg_is_in_recovery() AS standby,
       CASE WHEN NOT pg_is_in_recovery() THEN left(pg_walfile_name(pg_current_wal_lsn()), 8) END AS timeline
FROM chat.cache_state c WHERE id = 1
"""

SEED_STATE = """
INSERT INTO chat.cache_state (protocol, epoch, mode, cache, redis_identity) VALUES ($1, $2, $3, $4, $5)
ON CONFLICT ON CONSTRAINT cache_state_pkey DO NOTHING
"""

TAKE_OVER_STATE = """
UPDATE chat.cache_state SET protocol = $1, epoch = $2, cache = $3, redis_identity = $4, settled = true
WHERE id = 1 AND protocol < $1
"""

# Of two that change the same epoch, one finds it changed.
CHANGE_STATE = """
UPDATE chat.cache_state SET epoch = $2, mode = $3, cache = $4, redis_identity = $5, settled = $6
WHERE id = 1 AND epoch = $1
"""

SETTLE_STATE = "UPDATE chat.cache_state SET settled = true WHERE id = 1 AND epoch = $1 AND NOT settled"

PRESENT = """
INSERT INTO chat.instances (instance_id, version, protocol, started_at, last_seen)
VALUES ($1, $2, $3, clock_timestamp(), clock_timestamp())
ON CONFLICT ON CONSTRAINT instances_pkey DO UPDATE SET last_seen = excluded.last_seen
"""

OTHERS = """
SELECT count(*) FROM chat.instances
WHERE instance_id IS DISTINCT FROM $1 AND last_seen > clock_timestamp() - make_interval(secs => $2)
"""

ALIVE = """
SELECT version, protocol FROM chat.instances WHERE last_seen > clock_timestamp() - make_interval(secs => $1)
"""

LEAVE = """
DELETE FROM chat.instances WHERE instance_id = $1 OR last_seen < clock_timestamp() - interval '1 day'
"""
