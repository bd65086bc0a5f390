"""The archive in files, and back: `chat-sessions export` and `import`.

An export is a folder:

    manifest.json                                what is there: counts, times, the hash of each file
    sessions/month=2026-11/sessions.parquet      a row a session, by session_id
    messages/month=2026-11/messages.parquet      a row a message, by session_id and seq

The month is that of the session's id, as everywhere (`app.chat.session_month`); `month=legacy` has ids that carry
no time. Both files of a month are one snapshot of PostgreSQL; two months need not be the same one.
"""
