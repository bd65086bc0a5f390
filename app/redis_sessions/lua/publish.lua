-- publish(session; epoch, before_seq, before_chain, after_seq, after_chain, lines, last_activity, ttl_ms,
--         messages_max, bytes_max, want_value) -> {outcome} | {'published', value}
--
-- KEYS[1]   session:{id}    string, see codec.py
-- ARGV[1]   epoch           16 hex digits; the entry must carry it
-- ARGV[2]   before_seq      10 digits; the entry must stand exactly here ...
-- ARGV[3]   before_chain    16 hex digits; ... with this history
-- ARGV[4]   after_seq       10 digits
-- ARGV[5]   after_chain     16 hex digits
-- ARGV[6]   lines           the new messages, ",\n" before each, and the closing brackets of the value
-- ARGV[7]   last_activity   24 characters, RFC 3339
-- ARGV[8]   ttl_ms          the sliding time to live, milliseconds
-- ARGV[9]   messages_max    the window's bound, messages
-- ARGV[10]  bytes_max       the window's bound, bytes
-- ARGV[11]  want_value      '1': answer with the value as it stands after the append
--
-- outcome: 'published' | 'absent' | 'behind' (it stands elsewhere, or is not ours) | 'redis-owned'
--
-- Safe to repeat and to arrive late: it changes nothing but an entry that stands exactly before the write.
-- PEXPIRE comes last: a script that began with it could grow past maxmemory.

local head = read_head()
if head == '' then return {'absent'} end
if not head or not intact(head) then return {'behind'} end
if field(head, 'owner') == 'r' then return {'redis-owned'} end
if field(head, 'epoch') ~= ARGV[1] or field(head, 'seq') ~= ARGV[2] or field(head, 'chain') ~= ARGV[3] then
  return {'behind'}
end

local first_seq, first_offset = tonumber(field(head, 'first_seq')), tonumber(field(head, 'first_offset'))
local after_seq = tonumber(ARGV[4])
local size = append_lines(first_offset, redis.call('STRLEN', key), ARGV[6])

local surplus = after_seq - first_seq + 1 - tonumber(ARGV[9])
local offset, seq = first_offset, first_seq
if surplus > 0 then
  offset = skip_lines(offset, surplus, size)
  seq = seq + surplus
end
while size - offset > tonumber(ARGV[10]) and seq <= after_seq do
  offset = skip_lines(offset, 1, size)
  seq = seq + 1
end
offset = drop_lines(head, first_offset, offset, size)
redis.call('SETRANGE', key, at.seq, ARGV[4] .. ARGV[5] .. between(head, 'pending', 'first_seq')
  .. rest_of_head(head, seq, offset, ARGV[7]))
redis.call('PEXPIRE', key, ARGV[8])
if ARGV[11] == '1' then return {'published', redis.call('GET', key)} end
return {'published'}
