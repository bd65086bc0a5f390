-- mark(session; epoch, before_seq, before_chain, after_seq, token, ttl_ms) -> outcome: inside the transaction
-- that will commit a write, under the session's row lock
--
-- KEYS[1]  session:{id}    string, see codec.py
-- ARGV[1]  epoch           16 hex digits, the era of the writer
-- ARGV[2]  before_seq      10 digits, where the row stands
-- ARGV[3]  before_chain    16 hex digits, the row's history
-- ARGV[4]  after_seq       10 digits, where it will stand
-- ARGV[5]  token           16 hex digits, the mark's own
-- ARGV[6]  ttl_ms          the sliding time to live, milliseconds
--
-- outcome: 'marked'       the entry is dirty now: nobody believes it before it was published or validated
--          'touched'      there is no entry to mark (any more)
--          'redis-owned'  Redis holds the session for itself; left alone
--          'foreign'      not in our format, may be the guide's; left alone
--
-- Safe to repeat, and to arrive late: it only ever takes trust away.

local head = read_head()
if head and ours(head) and field(head, 'owner') == 'r' then return 'redis-owned' end
if head and string.sub(head, 1, 1) == '{' and not ours(head) then return 'foreign' end
-- Needs no memory; after it Redis lets the script write its few bytes even when it is out of memory.
redis.call('PEXPIRE', key, ARGV[6])
local seq = head and head ~= '' and intact(head) and tonumber(field(head, 'seq'))
local before = tonumber(ARGV[2])
if not seq or seq > before or (seq == before and field(head, 'chain') ~= ARGV[3])
  or (field(head, 'epoch') ~= ARGV[1] and seq ~= before) then
  -- The SET is a touch: without it a fill that found the key absent would not be aborted (a bare DEL of an
  -- absent key does not fail a WATCH).
  redis.call('SET', key, '')
  redis.call('UNLINK', key)
  return 'touched'
end
-- An entry of an older epoch that stands exactly where the row does is as good as a new one: it comes along,
-- dirty, and the publish makes it trusted.
local pending = field(head, 'pending')
if tonumber(ARGV[4]) >= tonumber(pending) then pending = ARGV[4] end
-- The token always: a settle that comes late must not clear a skeleton that was marked meanwhile.
redis.call('SETRANGE', key, at.epoch, ARGV[1] .. between(head, 'seq', 'pending') .. pending .. ARGV[5])
return 'marked'
