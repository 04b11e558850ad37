-- values.lua - stands before meter.lua and permits.lua: what a key's value must be like. Whoever has the password can
-- write anything there. It is looked at before it is used, so that no value makes a script fail: a host that gets an
-- error takes the whole server for away.

local BIG = 9007199254740991 -- 2^53 - 1
local LARGEST = 4194304 -- bytes of a value: some thousands of hosts

-- Is a number in this range? NaN is in none. Raises an error for what is no number, which state_at() catches.
local function within(x, low, high) return x >= low and x <= high end

-- The state at a key; nil: there is none; false: what stands there is none. is_state: of what is unpacked; it may
-- raise, and need not look at fields that nobody uses (another release's, say).
local function state_at(key, is_state)
  local packed = redis.pcall('GET', key)
  if not packed then return nil end
  if type(packed) == 'table' then
    if string.find(packed.err or '', 'WRONGTYPE') then return false end
    redis.call('GET', key) -- raises it as it was: no rights, say
  end
  if #packed > LARGEST then return false end
  local could, state, more = pcall(cmsgpack.unpack, packed)
  if not could or more ~= nil or type(state) ~= 'table' then return false end
  local looked, is = pcall(is_state, state)
  return looked and is and state or false
end

