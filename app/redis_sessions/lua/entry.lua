-- entry: how every script looks into a session's value. Put in front of each of them. KEYS[1] is always the session's
-- key. codec.py writes the layout into all of them: `at.seq` is where that field begins and `width.seq` how long it is,
-- `field(head, 'seq')` what stands there, and `between(head, 'seq', 'pending')` what stands from there to a later one.
--
-- All scripts write the lines first and then, in one piece, all fields of the head that change: Lua has no rollback,
-- and a value whose head and lines disagree is read as no session at all.
--
-- What costs is the calls (each about 1 us, and those that write go to the append-only file one by one) and the bytes
-- of the strings: Lua hashes each it is given or makes. So the head comes with what mostly follows it, and nothing is
-- joined that the caller can send joined.

local key = KEYS[1]

-- The fixed part of the head and the text behind it, as far as a usual user id and the line break after it reach;
-- '' for an absent key, nil where the key holds another type.
local function read_head()
  local head = redis.pcall('GETRANGE', key, 0, at.user_id + 79)
  if type(head) == 'table' then return nil end
  return head
end

local function digits(number)
  return string.format('%010d', number)
end

local function ours(head)
  return string.sub(head, 1, 7) == '{"_c":"' and field(head, 'version') == '1'
end

local function byte_at(head, offset)
  if offset < #head then return string.sub(head, offset + 1, offset + 1) end
  return redis.call('GETRANGE', key, offset, offset)
end

-- Ours, with its lines where the head says: not what somebody cut or wrote over by hand. Splicing such a
-- value would acknowledge a message that nobody can read.
local function intact(head)
  local first_offset = tonumber(field(head, 'first_offset'))
  return ours(head) and tonumber(field(head, 'seq')) and tonumber(field(head, 'first_seq')) and first_offset
    and byte_at(head, first_offset - 1) == '\n'
    and redis.call('GETRANGE', key, -2, -1) == ']}'
end

-- Where the lines begin: right after the first line break. A user id has at most 256 characters,
-- 1,536 bytes when each is escaped.
local function body_offset(head)
  local stop = string.find(head, '\n', at.user_id + 1, true)
  if stop then return stop end
  local text = redis.call('GETRANGE', key, at.user_id, at.user_id + 2047)
  return at.user_id + string.find(text, '\n', 1, true)
end

-- The offset after `count` lines from `from`; `size - 2`, before the closing brackets, where there are
-- fewer. Reads ahead in growing steps, so dropping one line costs about its own length.
local function skip_lines(from, count, size)
  local step = 1024
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

-- Writes `text` after the last line: ",\n" before each new line, and the closing brackets. Returns the new size.
local function append_lines(first_offset, size, text)
  if first_offset == size - 2 then text = string.sub(text, 3) end
  return redis.call('SETRANGE', key, size - 2, text)
end

-- Blanks the lines before `offset`, which will be the first live one, and compacts the value once blanks
-- exceed 1/4 of it: each byte is moved at most a bounded number of times, so an append stays amortised
-- O(1). (A rewrite at every append was measured at 8 to 50 times the cost of the splice.) Returns where the first live
-- line is then. A tighter bound saves no memory: Redis gives a string that has grown room to double.
local function drop_lines(head, first_offset, offset, size)
  if offset == first_offset then return offset end
  redis.call('SETRANGE', key, first_offset, string.rep(' ', offset - first_offset - 1) .. '\n')
  local body = body_offset(head)
  if (offset - body) * 4 <= size then return offset end
  local value = redis.call('GETRANGE', key, 0, body - 1) .. redis.call('GETRANGE', key, offset, -1)
  redis.call('SET', key, value, 'KEEPTTL')
  return body
end

-- What stands from field `first_seq` to the user id, with these values in it.
local function rest_of_head(head, first_seq, first_offset, last_activity)
  return digits(first_seq) .. digits(first_offset)
    .. string.sub(head, at.first_offset + width.first_offset + 1, at.last_activity) .. last_activity
end
