-- release_turn(turn; token) -> 1 released | 0 held by another, or not at all
--
-- KEYS[1]  turn:{id}:{message}   string "token until_ms", in the auxiliary database
-- ARGV[1]  token                 36 characters
--
-- Safe to repeat and to arrive late: a token is used once.

local turn = redis.call('GET', KEYS[1])
if turn and string.sub(turn, 1, 36) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
