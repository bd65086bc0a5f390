-- claim(session; found, value) -> 1 claimed | 0 it is not what was found any more: in Redis-only mode without a database
--
-- KEYS[1]  session:{id}   string in the guide's own format
-- ARGV[1]  found          the value as it was read, byte by byte
-- ARGV[2]  value          the same session in our layout, see codec.py
--
-- Keeps the time to live. Safe to repeat: a second one finds another value. So is what the guide's program writes in
-- between: it is read and claimed anew.

if redis.pcall('GET', key) ~= ARGV[1] then return 0 end
redis.call('SET', key, ARGV[2], 'KEEPTTL')
return 1
