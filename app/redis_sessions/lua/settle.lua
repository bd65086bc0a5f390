-- settle(session; token) -> 1 made clean | 0 marked by another since, or gone
--
-- KEYS[1]  session:{id}   string, see codec.py
-- ARGV[1]  token          16 hex digits, of the skeleton that was set before the session's row was committed
--
-- Safe to repeat and to arrive late: a token is used once, and a mark replaces it.

local head = read_head()
if not head or head == '' or not intact(head) or field(head, 'token') ~= ARGV[1] then return 0 end
redis.call('SETRANGE', key, at.pending, string.rep('0', width.pending + width.token))
return 1
