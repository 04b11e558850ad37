-- permits.lua - permit leases: how many permits of one key each host may hold. All hosts together hold at most n.
-- Argued in csrc/DESIGN.md, "Permits over many hosts".
--
-- KEYS[1]: the state of the key, packed by cmsgpack. It lives as long as a host's lease does.
-- ARGV, after those of values.lua: the key; n; then the version of the host's lease, as two numbers by which two versions are
--   ordered (its end; and under the same end a number that only falls); reported (the permits leased to it, or those
--   that it holds where these are more); want (permits beyond that; 0: to renew or to give back)
-- Answer: whether the version was the newest (0: nothing was done, look and ask again), the permits leased to the
--   host, what all hosts have, how many hosts have or want some, us of back-off for a host that was refused (0: it was
--   not), whether the value was not ours (1, 0).
--
-- State: t (us, when it was written), r (when hosts were last asked to give back), h (hosts), q (until then none is
-- granted more).
--   host   a: the permits that it counts with, never less than any answer that can still be put in; e, l: the
--          version that the last answer is for; t: us, until when it counts; w: when it was last refused (0: it wants
--          none); s: since when it is refused; k: the key as it calls it, if sealed
-- Where the server's clock jumps back, instants move along: what is left of them stays the same.
-- A value that is no such state (values.lua) was written by a broken or hostile host. What hosts hold is not known
-- then, so no host is granted more for TTL: by then all have reported.

local TTL = 10000000 -- us that a host counts after its last contact. Hosts use what they have for 8 s: permits.py
local BACK_OFF = 60000 -- us after a refusal before the host asks again
local WAITS = 200000 -- us after a refusal for which a host counts as one that wants more
local RECALL = 200000 -- us between two calls to give back

local floor, min, max = math.floor, math.min, math.max
local name = ARGV[5]
local n, e, l = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local reported, want = tonumber(ARGV[9]), tonumber(ARGV[10])

local state = state_at(KEYS[1], function(found)
  for id, h in pairs(found.h) do
    if type(id) ~= 'string' or not within(h.t, -BIG, BIG) or not within(h.a, 0, BIG) or not within(h.w, 0, BIG)
       or not within(h.s, 0, BIG) or not within(h.e, 0, BIG) or not within(h.l, 0, BIG)
       or h.k and type(h.k) ~= 'string' then
      return false
    end
  end
  return within(found.t, 0, BIG) and within(found.r, -BIG, BIG) and within(found.q or 0, -BIG, BIG)
end)
local junk = state == false
if not state then state = {t = now, r = 0, h = {}, q = junk and now + TTL or nil} end
local back = max(0, state.t - now)
state.t, state.r = now, state.r - back
state.q = state.q and min(state.q - back, now + TTL)
local waits_for_all = state.q and state.q > now
if not waits_for_all then state.q = nil end
local others, hosts, waiting = 0, 1, false
local named = {}
local least -- of those who wait
local since = {} -- of those who wait and have none
for id, h in pairs(state.h) do
  h.t, h.w, h.s = min(h.t - back, now + TTL), min(max(0, h.w - back), now), max(0, h.s - back)
  local waits = h.w > now - WAITS
  if not waits then h.s = 0 end
  if h.t <= now then
    state.h[id] = nil
  elseif id ~= host then
    others = others + h.a
    if h.k and h.a > 0 then named[#named + 1], named[#named + 2] = id, h.k end
    -- A host that has none and wants none gets no share.
    if h.a > 0 or waits then hosts = hosts + 1 end
    if waits then
      waiting, least = true, min(least or h.a, h.a)
      if h.a == 0 then table.insert(since, h.s) end
    end
  end
end

local me = state.h[host]
if me and (e < me.e or (e == me.e and l > me.l)) then
  return {0, 0, min(others + me.a, BIG), hosts, 0, 0} -- since then the host has reported a newer version
end
if not me then
  me = {a = reported, w = 0, s = 0}
elseif e == me.e and l == me.l then
  me.a = max(me.a, reported) -- an answer for this version may be put in yet: never less than that
else
  me.a = reported -- answers for an older version can no more be put in
end
state.h[host] = me
me.e, me.l, me.t, me.k = e, l, now + TTL, sealed and name or nil

local room = max(0, n - others)
local share = max(1, floor(n / hosts))
local lack = waits_for_all and 0 or reported + want - me.a
if lack > 0 then
  local free = max(0, room - me.a)
  local extra = 0
  if not waiting then
    extra = max(0, min(floor((free - lack) / (hosts + 1)), max(3, floor(me.a / 2))))
  elseif least < share then
    free = min(free, max(0, share - me.a)) -- others come first, up to their share
    if n < hosts then -- fewer than one for each: hosts without any are served in order
      for _, s in ipairs(since) do
        if me.s == 0 or s < me.s then free = free - 1 end
      end
      free = max(0, free)
    end
  end
  me.a = me.a + min(free, lack + extra)
end
-- More may be reported than there is room for: late, or held without a grant. It counts, and the host is allowed no
-- more than the room.
local leased, back_off = min(me.a, room), 0
if want > 0 then
  me.w = 0
  if leased >= reported + want then me.s = 0 end
  if leased < reported + want then
    me.w, back_off = now, BACK_OFF
    if me.s == 0 then me.s = now end
    if others > 0 and now - state.r >= RECALL then
      state.r = now
      -- Fewer permits than hosts: no host may keep taking back the one that it releases.
      local fair = n < hosts and 0 or share
      local need = max(want, min(floor(me.a / 2), share - me.a)) -- so that it has its share in few rounds
      local message = {sealed and 'P' or 'p', limiter, sealed and '' or name}
      message[4], message[5] = string.format('%.0f', fair), string.format('%.0f', need)
      for _, each in ipairs(named) do message[#message + 1] = each end
      redis.call('PUBLISH', channel, cmsgpack.pack(message))
    end
  end
end

local life = 0
for _, h in pairs(state.h) do life = min(max(life, h.t - now), BIG / 2) end
redis.call('SET', KEYS[1], cmsgpack.pack(state), 'PX', floor(life / 1000) + 1000)
return {1, leased, min(others + me.a, BIG), hosts, back_off, junk and 1 or 0}
