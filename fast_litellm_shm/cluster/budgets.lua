-- budgets.lua - money of one key in one window of the calendar, for all hosts. Argued in csrc/DESIGN.md, "Budgets over
-- many hosts".
--
-- KEYS[1]: the state, packed by cmsgpack; its name has the end of the window. It lives a day longer than that.
-- ARGV, after those of values.lua: the key; operation; the end of the window (minutes since 1970); the limit of the host that
--   calls; amount; over; warn: from this on, warn once (-1: never); what the host has settled in the window, in two
--   numbers: dollars, and nano-dollars of another one; and for a server that has lost its state: what the host has of
--   its lease, what it last knew to be leased to others, and to be added. All other amounts are millionths of a dollar.
-- Operations:
--   ask    lease the amount, which is what the host lacks (over: what of it is spent already), and a batch beyond
--          that; where not even the amount is left, of `over` what is left, and other hosts are asked to give back
--   owe    lease the amount, room or not: the host has spent it during an outage
--   give   give the amount back
--   add    raise the limit of all hosts for this window by the amount, or lower it (negative), to no less than 0
--   look   nothing but what the host has settled
--   reset  forget everything
-- Answer: whether the amount was leased (1, 0), how much was, what other hosts have leased in all, and have settled
--   (two numbers, as above), what was added to the limit, us of back-off after a refusal, whether it is time to warn
--   (1, 0), whether another host has reset the key, so that this one is to forget it first (1, 0), whether the value was
--   not ours (1, 0).
--
-- State: t (us, when it was written), a (added), h (hosts), z (leased to hosts that are forgotten), d, n (settled by
--   those), r (when hosts were last asked to give back), w (1: it was warned), f: where the state was lost, what is
--   leased to others than the host that called first, at least.
--   host   g: leased to it in this window, so never less than what it has spent or reserved; d, n: what it has settled,
--          at the last call; t: us, its last call; k: the key as it calls it, if sealed; x: 1: g began with what the
--          host had. After a reset: y: 1: it has not been told; m: it may yet give that much back, which is no more
--          counted; u: us, until when, after it was told
-- A value that is no such state (values.lua) was written by a broken or hostile host: the budget counts as used up.

local PART = 100 -- a batch is at most this part of the limit
local RECALL = 200000 -- us between two calls to give back
local BACK_OFF = 60000 -- us after a refusal before the host asks again, where others may give something back
local VERIFY = 1000000 -- and where they will not
local DAY = 86400000000 -- us
local LARGEST_SUM = 2251799813685248 -- 2^51: 2 * 10^9 dollars and more
local HOSTS = 256 -- that are known one by one
local STALE = 10000000 -- us after which no message is on its way any more

local floor, min, max = math.floor, math.min, math.max
local name, op, window, limit, amount = ARGV[5], ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local over, warn = tonumber(ARGV[10]), tonumber(ARGV[11])
local dollars, nanos, have = tonumber(ARGV[12]), tonumber(ARGV[13]), tonumber(ARGV[14])
local told, added = tonumber(ARGV[15]), tonumber(ARGV[16])

local state = state_at(KEYS[1], function(found)
  for id, h in pairs(found.h) do
    if type(id) ~= 'string' or not within(h.t, -BIG, BIG) or not within(h.g, 0, BIG) or not within(h.m or 0, 0, BIG)
       or not within(h.d, 0, BIG) or not within(h.n, 0, BIG) or not within(h.u or 0, 0, BIG) or h.k and type(h.k) ~= 'string' then
      return false
    end
  end
  return within(found.t, 0, BIG) and within(found.a, 0, BIG) and within(found.z, 0, BIG) and within(found.d, 0, BIG)
         and within(found.n, 0, BIG) and within(found.r, -BIG, BIG) and within(found.f or 0, 0, BIG)
end)
local junk, known = state == false, state and true
local function fresh(z) return {t = now, a = 0, h = {}, z = z, d = 0, n = 0, r = 0} end
if not state then
  state = fresh(junk and LARGEST_SUM or 0)
  state.a, state.f = added, told > 0 and told or nil
end
local back = max(0, state.t - now) -- the clock went back by this much: so do instants
state.r = state.r - back

local was_known, me = state.h[host], state.h[host]
if not me then me = {g = have, d = 0, n = 0, x = have > 0 and 1 or nil} end
local hosts, others, their_dollars, their_nanos = 1, state.z, state.d, state.n
local forgets = me.y and 1 or 0
if me.y then me.y, me.u, dollars, nanos, over = nil, now + STALE, 0, 0, 0 end
me.u = me.u and min(me.u, now + STALE)
if me.u and me.u < now then me.m, me.u = nil, nil end
local named, count, oldest = {}, 0, nil
for id, h in pairs(state.h) do
  h.t = h.t - back
  if id ~= host then
    hosts, others = hosts + (h.g > 0 and 1 or 0), others + h.g
    their_dollars, their_nanos = their_dollars + h.d, their_nanos + h.n
    if h.k and h.g > 0 then named[#named + 1], named[#named + 2] = id, h.k end
    count = count + 1
    if not oldest or h.t < state.h[oldest].t then oldest = id end
  end
end

-- window: in which hosts are to give back what they do not need; 0: they are to ask, since the key was reset
local function tell(window)
  local message = {sealed and 'B' or 'b', limiter, sealed and '' or name, string.format('%.0f', window)}
  for _, each in ipairs(named) do message[#message + 1] = each end
  redis.call('PUBLISH', channel, cmsgpack.pack(message))
end

others = max(others, state.f or 0)

local admitted, leased, back_off, warns = 0, 0, 0, 0
if op == 'ask' then
  local room = max(0, limit + state.a - others - me.g)
  admitted = amount <= room and 1 or 0
  if admitted == 1 then
    leased = amount + max(0, min(floor((room - amount) / (hosts + 1)), floor(limit / PART)))
  else
    leased = min(over, room)
    back_off = VERIFY
    if hosts > 1 then
      back_off = BACK_OFF
      if now - state.r >= RECALL then
        state.r = now
        tell(window)
      end
    end
  end
  me.g = me.g + leased
elseif op == 'owe' then
  me.g = me.x and max(me.g, have) or me.g + amount -- `have` includes the amount
elseif op == 'give' and was_known then
  local stale = min(amount, me.m or 0)
  me.m = stale > 0 and me.m - stale or me.m
  me.g = max(0, me.g - (amount - stale))
elseif op == 'add' then
  state.a = min(max(0, state.a + amount), LARGEST_SUM)
elseif op == 'reset' then
  local before = state.h
  before[host] = me
  state = fresh(0)
  for id, h in pairs(before) do
    local own = id == host
    state.h[id] = {t = h.t or now, g = 0, m = (h.m or 0) + h.g, d = 0, n = 0, k = h.k, y = not own and 1 or nil,
                   u = own and now + STALE or nil}
  end
  me, dollars, nanos = state.h[host], 0, 0
  others, their_dollars, their_nanos = 0, 0, 0
  if hosts > 1 and name ~= '' then tell(0) end
end
me.g, me.m = min(me.g, LARGEST_SUM), me.m and me.m > 0 and min(me.m, LARGEST_SUM) or nil
if op == 'ask' and warn >= 0 and not state.w and others + me.g >= warn then state.w, warns = 1, 1 end

local writes = op ~= 'reset' or known or junk
if op == 'look' then writes = was_known and (forgets == 1 or me.d ~= dollars or me.n ~= nanos) end
if writes then
  me.t, me.d, me.n, me.k = now, dollars, nanos, sealed and name or nil
  state.h[host], state.t = me, now
  if count >= HOSTS then -- what it has leased stays leased
    local h = state.h[oldest]
    state.h[oldest] = nil
    state.z, state.d, state.n = min(state.z + h.g, LARGEST_SUM), min(state.d + h.d, BIG), min(state.n + h.n, BIG)
  end
  local life = min(max(0, window * 60000000 - now) + DAY, BIG)
  redis.call('SET', KEYS[1], cmsgpack.pack(state), 'PX', floor(life / 1000))
end

local answer = {admitted, leased, others, their_dollars, their_nanos, state.a, back_off, warns, forgets, junk and 1 or 0}
for i, x in ipairs(answer) do answer[i] = min(x, BIG) end
return answer
