-- append(session, turn; ...) -> {outcome, ...}: a write in Redis-only mode, where Redis is the truth
--
-- KEYS[1]   session:{id}      string, see codec.py
-- KEYS[2]   turn:{id}:{msg}   string "token until_ms" in the auxiliary database; left out for no turn
-- ARGV[1]   user_id           JSON text; '' where any caller may write
-- ARGV[2]   if_match          10 digits that the seq must equal; '' for no condition
-- ARGV[3]   last_activity     24 characters, RFC 3339
-- ARGV[4]   ttl_ms            the sliding time to live, milliseconds
-- ARGV[5]   messages_max      the window's bound, messages
-- ARGV[6]   bytes_max         an append that would pass it is refused, bytes
-- ARGV[7]   want_value        '1': answer with the whole value, else with its head
-- ARGV[8]   first_prefix      how the request's first line begins; '' for a request without a key
-- ARGV[9]   first_suffix      how that line ends: the digest and size of the request
-- ARGV[10]  last_prefix       how the request's last line (a turn: its answer) begins
-- ARGV[11]  step              'begin' | 'finish' | '' for an append outside a turn
-- ARGV[12]  token             36 characters, the turn's holder
-- ARGV[13]  lease_ms          how long the turn is held, milliseconds
-- ARGV[14]  main_db           number of the database of KEYS[1]
-- ARGV[15]  aux_db            number of the database of KEYS[2]
-- ARGV[16]  claims          '1': an entry that PostgreSQL owns becomes Redis's with this write (no database)
-- ARGV[17+] prefix, tail      two strings a message: the line without its seq, which is put between them
--
-- {'absent'}                  no such session, or another user's
-- {'foreign'}                 something that is not in our format: the caller looks at it
-- {'not-ours'}                PostgreSQL owns it, or it is being handed over; left alone
-- {'replayed', value}         the request was stored before
-- {'taken-over', value}       it was stored without an answer, and this caller may answer it now
-- {'running', left_ms}        it was stored, and its turn is still held
-- {'reused'}                  the key was used for another request
-- {'lost'}                    the turn is held by another
-- {'moved', seq}              the session is not where if_match says
-- {'full'}                    the append would pass bytes_max
-- {'appended', value|head}
--
-- Not safe to repeat without a key: the caller never sends it twice. It begins with a write that needs
-- memory, so that Redis refuses it whole when it is out of memory.

local turn_key = KEYS[2]
local head = read_head()
if head == '' then return {'absent'} end
if not head or not intact(head) then return {'foreign'} end
if ARGV[16] ~= '1'
  and (field(head, 'owner') ~= 'r' or tonumber(field(head, 'pending')) > tonumber(field(head, 'seq'))) then
  return {'not-ours'}
end

local body = body_offset(head)
if body > #head then head = redis.call('GETRANGE', key, 0, body - 1) end
if ARGV[1] ~= '' and string.sub(head, at.user_id + 1, body) ~= ARGV[1] .. ',"messages":[\n' then
  return {'absent'}
end

local function turn_call(...)
  if ARGV[14] ~= ARGV[15] then redis.call('SELECT', ARGV[15]) end
  local answer = redis.call(...)
  if ARGV[14] ~= ARGV[15] then redis.call('SELECT', ARGV[14]) end
  return answer
end

local function now_ms()
  local now = redis.call('TIME')
  return now[1] * 1000 + math.floor(now[2] / 1000)
end

local function hold_turn()
  local until_ms = now_ms() + tonumber(ARGV[13])
  -- Kept past the lease, so that a holder which comes late is told apart from one that was replaced.
  turn_call('SET', turn_key, ARGV[12] .. ' ' .. string.format('%.0f', until_ms), 'PX', ARGV[13] + ARGV[4])
end

local function replay()
  local value = redis.call('GET', key)
  local first = string.find(value, '\n' .. ARGV[8], 1, true)
  local last = string.find(value, '\n' .. ARGV[10], 1, true)
  if not first and not last then return nil end
  if first then
    local stop = string.find(value, '\n', first + 1, true)
    local line = stop and string.sub(value, first + 1, stop - 2) or string.sub(value, first + 1, -3)
    if string.sub(line, -#ARGV[9]) ~= ARGV[9] then return {'reused'} end
  end
  if ARGV[11] ~= 'begin' or last then
    redis.call('PEXPIRE', key, ARGV[4])
    return {'replayed', value}
  end
  local turn = turn_call('GET', turn_key)
  local left = turn and tonumber(string.sub(turn, 38)) - now_ms() or 0
  if left > 0 then return {'running', left} end
  hold_turn()
  redis.call('PEXPIRE', key, ARGV[4])
  return {'taken-over', value}
end

if ARGV[8] ~= '' then
  local answer = replay()
  if answer then return answer end
end
if ARGV[11] == 'finish' and turn_key then
  local turn = turn_call('GET', turn_key)
  if not turn or string.sub(turn, 1, 36) ~= ARGV[12] then return {'lost'} end
end

local seq = tonumber(field(head, 'seq'))
if ARGV[2] ~= '' and tonumber(ARGV[2]) ~= seq then return {'moved', seq} end

local lines = {}
for i = 17, #ARGV, 2 do
  seq = seq + 1
  lines[#lines + 1] = ',\n' .. ARGV[i] .. string.format('%.0f', seq) .. ARGV[i + 1]
end
lines = table.concat(lines) .. ']}'

local first_seq, first_offset = tonumber(field(head, 'first_seq')), tonumber(field(head, 'first_offset'))
local size = redis.call('STRLEN', key)
local surplus = math.max(0, seq - first_seq + 1 - tonumber(ARGV[5]))
local offset = skip_lines(first_offset, surplus, size)
-- The closing brackets stand there already, and no comma and line break go before what becomes the first line.
local saved = offset == size - 2 and 4 or 2
if body + size - offset + #lines - saved > tonumber(ARGV[6]) then return {'full'} end

local old_size = size
size = append_lines(first_offset, size, lines)
-- More are to go than there were: the rest is among the new ones.
if offset == old_size - 2 then offset = skip_lines(first_offset, surplus, size) end
offset = drop_lines(head, first_offset, offset, size)
-- From here on Redis owns the session. The chain compares an entry with a row: there is none to compare.
local fields = 'r' .. string.rep('0', width.epoch) .. digits(seq) .. string.rep('0', width.chain + width.pending)
  .. between(head, 'token', 'first_seq') .. rest_of_head(head, first_seq + surplus, offset, ARGV[3])
redis.call('SETRANGE', key, at.owner, fields)
redis.call('PEXPIRE', key, ARGV[4])
if turn_key then
  if ARGV[11] == 'begin' then hold_turn() else turn_call('DEL', turn_key) end
end
if ARGV[7] == '1' then return {'appended', redis.call('GET', key)} end
return {'appended', string.sub(head, 1, at.owner) .. fields .. string.sub(head, at.owner + #fields + 1, body)}
