-- meter.lua - the global meter of one key, for all hosts. The arithmetic is that of csrc/meter.h.
--
-- KEYS[1]: the state of the key, packed by cmsgpack. It lives as long as anything in it counts.
-- ARGV: operation, host, channel, limiter, key, how many limits; then twelve numbers for each limit:
--   kind, n, per (us), burst, num, den (ns), lease (us), cost, kept, given, used, left (us or ns ahead)
-- Operations:
--   take    give back `given`, then charge the cost if it fits every limit, and a batch of as much more for
--           the host's wallet, which is empty until then
--   single  the same without a batch, for a host that cannot keep one
--   ahead   the batch alone, since the host's wallet runs low
--   look    nothing is charged
--   give    give back `given` tokens of the host's wallet; nothing is charged
--   charge  charge the cost, room or not; fill: the same, but never beyond the limit
--   refund  give the cost back; of a window that has `left` us left for the host: of no later one
--   block   give back `given`, and deny for so many ns as the cost says, or longer: buckets
--   reset   forget what was consumed
-- Answer: admitted (1, 0), how many times the cost the batch holds, us until the cost fits (0; -1 never),
--   us for which the host need not ask again (also where it was admitted), the limit that refused; then four numbers for each limit:
--   tokens used, left (as above), us that the lease lasts, whether `kept` was dated anew.
--
-- State: t (us, when it was written), l (limits), h (hosts), x (it was reset). All times in it are spans from
-- t on, so that a clock of the server that jumps back costs nobody anything.
--   limit  k: kind. Bucket: a: ns that the arrival time is ahead; i: its interval (float, for a change of
--          limits). Window: w: us left; c: count; s: serial number of the window; d: us of w by which debt has
--          prolonged it. Sliding: and p: previous.
--   host   t: us, when it last called; g: when it was last granted something; b: batches it was granted then;
--          p: for each limit, bucket: a after that grant; else s at that grant; r: when it was asked to give
--          back; o: whether it may hold tokens.
-- Numbers are doubles: every integer below is less than 2^53. (cluster/script.py refuses larger limits.)

local FIELDS, HEAD = 12, 6
local PACE = 250000 -- us that a batch should last: several times what a thread may wait for its interpreter
local CALM = 60000 -- us after a refusal before the host asks again, at least
local VERIFY = 1000000 -- and at most
local RECALL = 500000 -- us within which a host gives back what it is asked for, or never will
local REPEAT = 5000000 -- but it is asked again: it may not have heard
local ACTIVE = 1000000 -- us since its last call for which a host counts as one of those who want a share
local FORGET = 600000000 -- us after which a host that holds nothing is forgotten, where hosts are many
local MOST = 16777214 -- tokens in a wallet: WALLET_MOST of meter.h

local floor, ceil, min, max = math.floor, math.ceil, math.min, math.max
local op, host, channel, limiter, name = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local count = tonumber(ARGV[6])
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

local rules = {}
for i = 1, count do
  local at, r = HEAD + (i - 1) * FIELDS, {}
  for k, field in ipairs({'kind', 'n', 'per', 'burst', 'num', 'den', 'lease', 'cost', 'kept', 'given',
                          'used', 'left'}) do
    r[field] = tonumber(ARGV[at + k])
  end
  rules[i] = r
end

-- arithmetic ----------------------------------------------------------------------------------------

-- cost * num / den without a product beyond 2^53: num = whole * den + part
local function times(r, cost, round)
  local whole = floor(r.num / r.den)
  local part = r.num - whole * r.den
  return cost * whole + round(cost * part / r.den)
end
local function increment(r, cost) return times(r, cost, ceil) end
local function room(r, cost) return times(r, r.burst - cost, floor) end

local function fresh(r) return {k = r.kind, a = 0, w = 0, c = 0, p = 0, s = 0} end

-- Let time pass.
local function advance(r, m, span)
  if r.kind == 0 then
    m.a = max(0, m.a - span * 1000)
    local interval = r.num / r.den
    if m.i and m.i ~= interval and m.a > 0 then m.a = ceil(m.a * interval / m.i) end -- other limits
    m.i = interval
  elseif m.w > span then
    m.w = m.w - span
  elseif m.w > 0 then
    local over = span - m.w
    if r.kind == 2 and over < r.per and m.c > 0 then
      m.p, m.c, m.w, m.s = m.c, 0, r.per - over, m.s + 1
    else
      m.p, m.c, m.w, m.d = 0, 0, 0, nil
    end
  end
end

-- previous * left / per, rounded up
local function weight(previous, left, per)
  while previous * left >= 4503599627370496 do left, per = ceil(left / 2), floor(per / 2) end
  return ceil(previous * left / per)
end

local function used(r, m)
  if r.kind == 2 then return m.c + weight(m.p, m.w, r.per) end
  return m.c
end

-- Tokens that fit now.
local function available(r, m)
  if r.kind ~= 0 then return max(0, r.n - used(r, m)) end
  local fits = min(r.burst, max(0, r.burst - ceil(m.a * r.den / r.num)))
  while fits < r.burst and room(r, fits + 1) >= m.a do fits = fits + 1 end
  while fits > 0 and room(r, fits) < m.a do fits = fits - 1 end
  return fits
end

local function charge(r, m, cost)
  if cost == 0 then return end
  if r.kind == 0 then
    m.a = m.a + increment(r, cost)
  else
    if m.w == 0 then m.w, m.s = r.per, m.s + 1 end
    m.c = m.c + cost
  end
end

-- How far into a window `full` tokens of the one before leave room.
local function room_at(r, full, room)
  if full <= room then return 0 end
  return r.per - floor(room * r.per / full)
end

local function retry(r, m, cost)
  if r.kind == 0 then
    if cost > r.burst then return -1 end
    return ceil(max(0, m.a - room(r, cost)) / 1000)
  end
  if cost > r.n then return -1 end
  if available(r, m) >= cost then return 0 end
  if r.kind == 1 then return max(1, m.w) end
  if m.c + cost <= r.n then return max(1, room_at(r, m.p, r.n - m.c - cost) - (r.per - m.w)) end
  return max(1, m.w + room_at(r, m.c, r.n - cost))
end

-- Give back what the host was granted and has not spent. What has drained since belongs to others by now.
local function give_back(r, m, me, i, tokens)
  local at = me.p and me.p[i]
  if tokens == 0 or not at then return end
  if r.kind == 0 then
    m.a = max(0, m.a - min(increment(r, tokens), max(0, at - (now - me.g) * 1000)))
  elseif m.s == at then
    m.c = m.c - min(m.c, tokens)
  elseif r.kind == 2 and m.s == at + 1 then
    m.p = m.p - min(m.p, tokens)
  end
end

-- the state -----------------------------------------------------------------------------------------

local packed = redis.call('GET', KEYS[1])
local state = packed and cmsgpack.unpack(packed) or {t = now, l = {}, h = {}}
local span = max(0, now - state.t)
local back = max(0, state.t - now) -- the clock went back by this much: so do instants
state.t = now
for i, r in ipairs(rules) do
  if not state.l[i] or state.l[i].k ~= r.kind then state.l[i] = fresh(r) end
  advance(r, state.l[i], span)
end
for i = #state.l, count + 1, -1 do state.l[i] = nil end
local hosts, others, idle = 0, 0, {}
for id, h in pairs(state.h) do
  if back > 0 then
    h.t, h.g, h.r = h.t - back, h.g - back, h.r and h.r - back
  end
  others = others + 1
  if id ~= host and h.t > now - ACTIVE then hosts = hosts + 1 end
  if id ~= host and h.t < now - FORGET then idle[#idle + 1] = id end
end
if others > 64 then
  for _, id in ipairs(idle) do state.h[id] = nil end
end
hosts = hosts + 1

-- A host that this state has never seen, and that knows more than is in it: the state was lost (a restart
-- without persistence, a failover). What the hosts know last is what it was, so it grows together again. That
-- has what a host admitted while the server was away, of all its processes: while these tell of it, each its own
-- part, it would count twice. So a host is not seen by that.
local me = state.h[host]
if not me then
  me = {t = now, g = now, b = 0}
  if op ~= 'fill' then state.h[host] = me end
  if not state.x and op ~= 'fill' then
    for i, r in ipairs(rules) do
      local m = state.l[i]
      if r.kind == 0 then
        m.a = max(m.a, r.left)
      elseif r.left > 0 and r.used > 0 then
        if m.w == 0 then m.w, m.s = min(r.left, r.per), m.s + 1 end
        m.c = max(m.c, r.used)
      end
    end
  end
end

-- operations ----------------------------------------------------------------------------------------

local admitted, batch, wait, calm, refused = 1, 0, 0, 0, 0
local redated = {}

-- Do all limits have room for `times` of the cost?
local function fits(n)
  for i, r in ipairs(rules) do
    local m, cost = state.l[i], n * r.cost
    if r.kind == 0 and n > 0 then
      if cost > r.burst or room(r, cost) < m.a then return false end -- in debt, a cost of 0 does not fit
    elseif cost > 0 and available(r, m) < cost then
      return false
    end
  end
  return true
end

-- Ask the others to give back what they hold, and tell for how long it pays to ask again soon.
local function recall()
  local hope, ask = false, false
  for id, h in pairs(state.h) do
    if id ~= host and h.o then
      if not h.r or now - h.r > REPEAT then
        h.r, ask = now, true
      end
      hope = hope or now - h.r < RECALL
    end
  end
  if ask then redis.call('PUBLISH', channel, cmsgpack.pack({limiter, name})) end
  return hope
end

-- As many times the cost as the host uses in PACE, and at most its share of what is left.
local function size()
  local pace = PACE
  for _, r in ipairs(rules) do
    if r.kind == 0 then pace = min(pace, r.lease / 2) end
  end
  local n = 4
  if me.b > 0 then
    n = floor(me.b * pace / max(now - me.g, 1000))
    n = max(4, floor(me.b / 4), min(n, me.b * 8))
  end
  local asks = false
  for i, r in ipairs(rules) do
    if r.cost > 0 then
      asks = true
      n = min(n, floor(available(r, state.l[i]) / (hosts + 1) / r.cost), floor((MOST - r.kept) / r.cost))
    end
  end
  return asks and max(0, n) or 0
end

if op == 'give' then
  for i, r in ipairs(rules) do give_back(r, state.l[i], me, i, r.given) end
  me.o = nil
elseif op == 'take' or op == 'single' or op == 'ahead' then
  local once = op == 'ahead' and 0 or 1
  if op == 'take' then
    for i, r in ipairs(rules) do give_back(r, state.l[i], me, i, r.given) end
  end
  -- Tokens of a bucket that lie in the wallet still are given back and taken again, as of now, so that their
  -- lease can begin anew with the batch's; where that does not fit, they end as they would have.
  local before, whole = {}, op ~= 'single'
  for i, r in ipairs(rules) do
    before[i] = state.l[i].a
    if r.kind == 0 and r.kept > 0 and whole then
      give_back(r, state.l[i], me, i, r.kept)
      local fit = r.kept + once * r.cost
      whole = fit <= r.burst and available(r, state.l[i]) >= fit
    end
  end
  if whole then
    for i, r in ipairs(rules) do
      if r.kind == 0 then
        charge(r, state.l[i], r.kept)
        redated[i] = r.kept > 0
      end
    end
  else
    for i, r in ipairs(rules) do
      if r.kind == 0 then state.l[i].a = before[i] end
    end
  end
  if fits(once) then
    if once > 0 then
      for i, r in ipairs(rules) do charge(r, state.l[i], r.cost) end
    end
    if whole then batch = size() end
    for i, r in ipairs(rules) do
      if whole then
        charge(r, state.l[i], batch * r.cost)
        me.p = me.p or {}
        me.p[i] = r.kind == 0 and state.l[i].a or state.l[i].s
      end
    end
    if whole then
      me.g, me.b, me.o = now, max(batch, 1), nil
      for _, r in ipairs(rules) do
        if batch > 0 or r.kept > 0 then me.o = 1 end
      end
      if batch > 0 then me.r = nil end
    end
    -- That was the last: what comes back is worth a question when some of it has come.
    if once > 0 and batch == 0 and not fits(1) then
      for i, r in ipairs(rules) do
        if r.kind ~= 1 then
          local some = r.kind == 0 and r.burst * r.num / r.den / 2000 or r.per / 20
          calm = max(calm, min(CALM, max(retry(r, state.l[i], r.cost), floor(some))))
        end
      end
    end
  else
    admitted = 0
    for i, r in ipairs(rules) do
      local t = retry(r, state.l[i], r.cost)
      if wait ~= -1 and (t == -1 or t > wait) then
        wait, refused = t, i - 1
      end
    end
    local hope = recall()
    calm = wait == -1 and VERIFY or hope and CALM or min(max(wait, CALM), VERIFY)
    me.b = floor(me.b / 2)
  end
elseif op == 'look' then
  admitted = fits(1) and 1 or 0
  for i, r in ipairs(rules) do
    local t = admitted == 0 and retry(r, state.l[i], r.cost) or 0
    if wait ~= -1 and (t == -1 or t > wait) then
      wait, refused = t, i - 1
    end
  end
elseif op == 'charge' or op == 'fill' then
  for i, r in ipairs(rules) do
    local m, cost = state.l[i], r.cost
    if op == 'fill' then cost = min(cost, available(r, m)) end
    charge(r, m, cost)
    if r.kind == 1 and m.c > r.n then -- debt: the window is prolonged by per / n a token
      local more = ceil((m.c - r.n) * r.per / r.n)
      m.w, m.d, m.c = m.w + more, (m.d or 0) + more, r.n
    end
  end
elseif op == 'block' then
  for i, r in ipairs(rules) do
    local m = state.l[i]
    give_back(r, m, me, i, r.given)
    if r.kind == 0 and r.cost > 0 then m.a = max(m.a, r.cost + room(r, 1)) end
  end
  me.o = nil
elseif op == 'refund' then
  for i, r in ipairs(rules) do
    local m = state.l[i]
    if r.kind == 0 then
      m.a = max(0, m.a - increment(r, r.cost))
    elseif r.kind == 1 and r.left > 0 and m.w - (m.d or 0) - r.left > r.per / 2 then
      r.cost = 0 -- charged in a window that is over by now: the next one ends at least `per` later
    elseif r.kind == 1 then -- debt first: what the window is prolonged by
      local debt = min(r.cost, floor((m.d or 0) * r.n / r.per))
      local less = min(floor(debt * r.per / r.n), m.d or 0, m.w)
      m.w, m.d = m.w - less, (m.d or 0) - less
      m.c = m.c - min(m.c, r.cost - debt)
      if m.w == 0 then m.c, m.d = 0, nil end -- without the debt it would be over by now
    else
      local rest = r.cost - min(m.c, r.cost)
      m.c = m.c - (r.cost - rest)
      m.p = m.p - min(m.p, rest)
    end
  end
elseif op == 'reset' then
  for i, r in ipairs(rules) do
    local s = state.l[i].s
    state.l[i] = fresh(r)
    state.l[i].s = s + 1 -- what was granted before is nobody's
  end
  state.h = {}
  state.x = 1
end
me.t = now

-- until nothing of it counts: then the key is as one that was never seen
local life = ACTIVE
for i, r in ipairs(rules) do
  local m = state.l[i]
  if r.kind == 0 then
    life = max(life, ceil(m.a / 1000), r.lease)
  else
    life = max(life, m.w + (r.kind == 2 and r.per or 0))
  end
  if state.x then life = max(life, 2 * r.per) end -- longer than anybody's knowledge of before
end
redis.call('SET', KEYS[1], cmsgpack.pack(state), 'PX', ceil(life / 1000) + 1000)

local answer = {admitted, batch, wait, calm, refused}
for i, r in ipairs(rules) do
  local m = state.l[i]
  local lease = r.kind == 0 and r.lease or m.w
  answer[#answer + 1] = r.kind == 0 and r.burst - available(r, m) or used(r, m)
  answer[#answer + 1] = r.kind == 0 and m.a or m.w
  answer[#answer + 1] = lease
  answer[#answer + 1] = redated[i] and 1 or 0
end
return answer
