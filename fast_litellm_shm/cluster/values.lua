-- values.lua - is put before each of the scripts: reads the arguments that all of them have, and checks a key's
-- value before it is used. A host with the password can write any value. None may make a script fail: a host that gets
-- an error has an outage of the whole server.
--
-- ARGV: host, channel, limiter, whether the host sends names of keys sealed (1, 0).

local BIG = 9007199254740991 -- 2^53 - 1
local LARGEST = 4194304 -- bytes of a value: some thousands of hosts

local host, channel, limiter, sealed = ARGV[1], ARGV[2], ARGV[3], ARGV[4] == '1'
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

-- Is a number in this range? NaN is in none. Raises an error for another type, which state_at() catches.
local function within(x, low, high) return x >= low and x <= high end

-- The state at a key; nil: there is no value; false: the value is no state. is_state checks what is unpacked. It may
-- raise, and need not check fields that are not used (another release's, say).
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

