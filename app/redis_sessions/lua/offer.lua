-- offer(session; value, ttl_ms) -> 1 set | 0 Redis holds the session for itself already, or the guide's program does
--
-- KEYS[1]  session:{id}   string, see codec.py
-- ARGV[1]  value          an entry that Redis will own, dirty until its row says so
-- ARGV[2]  ttl_ms         milliseconds
--
-- Safe to repeat. One that arrives late finds the entry that it would have set, or sets a dirty one, which
-- nobody uses before a look at the row. Needs memory from the first write: refused whole when there is none.

local head = read_head()
if head and string.sub(head, 1, 1) == '{' and not ours(head) then return 0 end
if head and head ~= '' and intact(head) and field(head, 'owner') == 'r'
  and tonumber(field(head, 'pending')) <= tonumber(field(head, 'seq')) then
  return 0
end
redis.call('SET', key, ARGV[1], 'PX', ARGV[2])
return 1
