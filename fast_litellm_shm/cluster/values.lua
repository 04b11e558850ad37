-- values.lua - stands before meter.lua and permits.lua: what a key's value must be like. Whoever has the password can
-- write anything there. It is looked at before it is used, so that no value makes a script fail, or loop: a host that
-- gets an error takes the whole server for away.

local BIG = 9007199254740991 -- 2^53 - 1
local LARGEST = 4194304 -- bytes of a value: some thousands of hosts

-- NaN is between nothing.
local function between(low, high)
  return function(x) return type(x) == 'number' and x >= low and x <= high end
end
local function is_text(x) return type(x) == 'string' end

-- An array without holes of so many.
local function array(most, is)
  return function(x)
    if type(x) ~= 'table' or #x > most then return false end
    local found = 0
    for _, v in pairs(x) do
      found = found + 1
      if found > #x or not is(v) then return false end
    end
    return true
  end
end
local function map(is_key, is)
  return function(x)
    if type(x) ~= 'table' then return false end
    for k, v in pairs(x) do
      if not is_key(k) or not is(v) then return false end
    end
    return true
  end
end
-- A table with all fields of `needed`, and of others only those of `more`.
local function record(needed, more)
  return function(x)
    if type(x) ~= 'table' then return false end
    for name, is in pairs(needed) do
      if not is(x[name]) then return false end
    end
    for name, v in pairs(x) do
      if not needed[name] and not (more[name] and more[name](v)) then return false end
    end
    return true
  end
end

-- The state at a key; nil: there is none; false: what stands there is none.
local function state_at(key, is)
  local packed = redis.pcall('GET', key)
  if not packed then return nil end
  if type(packed) == 'table' then
    if string.find(packed.err or '', 'WRONGTYPE') then return false end
    redis.call('GET', key) -- raises it as it was: no rights, say
  end
  if #packed > LARGEST then return false end
  local could, state, more = pcall(cmsgpack.unpack, packed)
  return could and more == nil and is(state) and state or false
end

