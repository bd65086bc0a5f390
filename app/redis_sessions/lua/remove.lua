-- remove(session) -> 1 removed or absent | 0 Redis owns it, left alone; one that is dirty still is nobody's
--
-- KEYS[1]  session:{id}    string, see codec.py; anything else that stands there goes too
--
-- Safe to repeat and to arrive late: the caller holds the session's row lock or knows that it has no row,
-- and ids are never used twice.
-- The SET before the UNLINK is a touch: a bare DEL of an absent key does not abort the EXEC of a reader
-- that WATCHes it, so a fill that began before a delete would bring the session back.

local head = read_head()
if head and head ~= '' and ours(head) and field(head, 'owner') == 'r'
  and not (intact(head) and tonumber(field(head, 'pending')) > tonumber(field(head, 'seq'))) then
  return 0
end
-- It begins with PEXPIRE, so that Redis lets it write these few bytes when it is out of memory.
redis.call('PEXPIRE', key, 1000)
redis.call('SET', key, '')
redis.call('UNLINK', key)
return 1
