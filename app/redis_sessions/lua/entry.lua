-- entry: how every script looks into a session's value. Put in front of each of them, after the offsets
-- `at` and `width` that codec.py generates. KEYS[1] is always the session's key.
--
-- All scripts write the data first and the head's seq last: Lua has no rollback, and a value whose head
-- and lines disagree is read as no session at all.

local key = KEYS[1]

-- The fixed part of the head; '' for an absent key, nil where the key holds another type.
local function read_head()
  local head = redis.pcall('GETRANGE', key, 0, at.user_id - 1)
  if type(head) == 'table' then return nil end
  return head
end

local function field(head, name)
  return string.sub(head, at[name] + 1, at[name] + width[name])
end

local function ours(head)
  return string.sub(head, 1, 7) == '{"_c":"' and field(head, 'version') == '1'
end

-- Ours, with its lines where the head says: not what somebody cut or wrote over by hand. Splicing such a
-- value would acknowledge a message that nobody can read.
local function intact(head)
  local first_offset = tonumber(field(head, 'first_offset'))
  return ours(head) and tonumber(field(head, 'seq')) and tonumber(field(head, 'first_seq')) and first_offset
    and redis.call('GETRANGE', key, first_offset - 1, first_offset - 1) == '\n'
    and redis.call('GETRANGE', key, -2, -1) == ']}'
end

local function put(name, text)
  redis.call('SETRANGE', key, at[name], text)
end

local function put_number(name, number)
  put(name, string.format('%010d', number))
end

-- Where the lines begin: right after the first line break. A user id has at most 256 characters,
-- 1,536 bytes when each is escaped.
local function body_offset()
  local text = redis.call('GETRANGE', key, at.user_id, at.user_id + 2047)
  return at.user_id + string.find(text, '\n', 1, true)
end

-- The offset after `count` lines from `from`; `size - 2`, before the closing brackets, where there are
-- fewer. Reads ahead in growing steps, so dropping one line costs about its own length.
local function skip_lines(from, count, size)
  local step = 4096
  local searched = from
  while count > 0 do
    local chunk = redis.call('GETRANGE', key, searched, searched + step - 1)
    if chunk == '' then return size - 2 end
    local position = 0
    repeat
      position = string.find(chunk, '\n', position + 1, true)
      if position then
        count = count - 1
        from = searched + position
      end
    until not position or count == 0
    searched = searched + #chunk
    step = step * 2
  end
  return from
end

-- Writes `lines` after the last line. Returns the new size.
local function append_lines(first_offset, size, lines)
  local text = (first_offset == size - 2 and '' or ',\n') .. lines .. ']}'
  return redis.call('SETRANGE', key, size - 2, text)
end

-- Blanks the lines before `offset`, which will be the first live one, and compacts the value once blanks
-- exceed 1/12 of it: each byte is moved at most a bounded number of times, so an append stays amortised
-- O(1). (A rewrite at every append was measured at 8 to 50 times the cost of the splice.)
local function drop_lines(first_offset, offset, first_seq, size)
  if offset == first_offset then return end
  redis.call('SETRANGE', key, first_offset, string.rep(' ', offset - first_offset - 1) .. '\n')
  local body = body_offset()
  if (offset - body) * 12 > size then
    local value = redis.call('GETRANGE', key, 0, body - 1) .. redis.call('GETRANGE', key, offset, -1)
    redis.call('SET', key, value, 'KEEPTTL')
    offset = body
  end
  put_number('first_offset', offset)
  put_number('first_seq', first_seq)
end
