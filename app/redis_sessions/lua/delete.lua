-- delete(session; user_id) -> {'deleted', head} | {'absent'} | {'foreign'}: in Redis-only mode
--
-- KEYS[1]  session:{id}   string, see codec.py
-- ARGV[1]  user_id        JSON text of the owner; '' where any caller may delete
--
-- Safe to repeat: a second one finds nothing.

local head = read_head()
if head == '' then return {'absent'} end
if not head or not intact(head) then return {'foreign'} end
local whole = redis.call('GETRANGE', key, 0, body_offset(head) - 1)
if ARGV[1] ~= '' and string.sub(whole, at.user_id + 1) ~= ARGV[1] .. ',"messages":[\n' then return {'absent'} end
redis.call('UNLINK', key)
return {'deleted', whole}
