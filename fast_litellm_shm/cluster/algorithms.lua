-- algorithms.lua - the rate-limit algorithms, for all hosts: of one key, or of many with the same limits. The
-- arithmetic: csrc/limits/algorithms.h.
--
-- KEYS: the state of each key, packed by cmsgpack. It lives as long as anything in it counts. Each key is decided by
-- itself; many in one call only save what a call costs.
-- ARGV, after those of values.lua: the limits, and the questions, one for each key. Both packed (struct), numbers as
-- little-endian doubles:
--   of each limit seven: kind, n, per (us), burst, num, den (ns), lease (us)
--   A window of the calendar (kind 3) has three instants (us since 1970) in place of burst, num and den: when windows
--   end, one after the other, the first no earlier than an hour ago. The server's clock says which one is the present.
--   of each question a byte, the operation; the key's name, after its length in four bytes; and for each limit six:
--   cost, kept, given, and what the host knows: used, previous (of a sliding window, which has only the present one
--   in `used`), left (us or ns ahead; of a refund, the window that it is for, as an answer named it)
-- Operations, by number from 1 on:
--   take    give back `given`, then charge the cost if it fits every limit, and a batch of as much more for
--           the host's token lease, which is empty until then
--   single  the same without a batch, for a caller that asks for itself alone
--   ahead   the batch alone, since the host's token lease runs low
--   look    nothing is charged
--   give    give back `given` leased tokens; nothing is charged
--   charge  charge the cost, room or not; fill: the same, but never beyond the limit
--   refund  give the cost back: of a window that `left` names, and of no other
--   block   give back `given`, and deny for so many ns as the cost says, or longer: buckets
--   reset   forget what was consumed
-- Answer: of each question, one after the other, packed likewise: admitted (1, 0), how many times the cost the batch holds, us until the cost fits (0; -1 never),
--   us of back-off (also where it was admitted), the limit that refused, whether the value was not ours (1, 0); then
--   seven numbers for each limit: tokens used, left (as above), us that the lease lasts, whether `kept` was dated anew,
--   of a sliding window its two counts: this window's, the previous one's; and the window's name, which no other has.
--
-- State: t (us, when it was written), l (limits), h (hosts), x (it was reset). All times in it are spans from
-- t on, so a jump of the server's clock back changes nothing.
--   limit  k: kind; r: n, per, of a bucket burst, num, den of its label, the limit that wrote it; o: which of the
--          limits of the last call it is for, if any; f, q: kind and per of that, where they are not its label's.
--          Bucket: a: ns that the arrival time is ahead. Window: w: us until its end without debt (0 or less
--          while debt is waited out); c: tokens used in all; s: serial number of the window. Of the calendar: and e:
--          its end (us since 1970), and no debt: the next window is whole. Sliding: and p:
--          those of the previous one; g, h: how many of c, p were reported by `fill`.
--   host   t: us, when it last called; g: when it was last granted something; b: batches it was granted then;
--          p: for each limit, bucket: -1 - a after that grant, and in i the ns of a token; else s at that grant;
--          r: when it was asked to give back; o: whether it may hold tokens; k: the key as it calls it, if sealed.
--
-- A value that is no such state (values.lua) was written by a broken or hostile host. What it was is not known. So all
-- limits of the key count as used up, as of now: that host could have done the same by charging, and no host gains by
-- it. `reset` ends it.
--
-- Limits that change: a state stays under its label until the present limit leaves room for it, or would have it
-- empty sooner. So a window that is lowered and raised again has what it had, debt is only what exceeded the limit
-- that it was written under, and a bucket drains as it did until what is in it fits. Another kind takes the
-- tokens over.
-- Numbers are doubles: every integer below is less than 2^53. (cluster/algorithms.py refuses larger limits.)

local PACE = 250000 -- us that a batch should last: several times what a thread may wait for its interpreter
local BACK_OFF = 60000 -- us after a refusal before the host asks again, at least
local VERIFY = 1000000 -- and at most
local RECALL = 500000 -- us within which a host gives back what it is asked for, or never will
local REPEAT = 5000000 -- us until it is asked again: the message may have been lost
local ACTIVE = 1000000 -- us since its last call for which a host counts as one that wants a share
local FORGET = 600000000 -- us after which a host that holds nothing is forgotten, where hosts are many
local MOST = 16777214 -- tokens of a token lease: TOKEN_LEASE_MOST of algorithms.h
local USED = 2147483647 -- tokens of a window: WINDOW_MAX_N of algorithms.h
local LONGEST = 34560000000000 -- us, 400 days: no window of the calendar is longer
local PLACES = 12 -- limits that a key's state has at most, with those that were taken away

local floor, ceil, min, max = math.floor, math.ceil, math.min, math.max
local limits, questions = ARGV[5], ARGV[6]
local count = #limits / 56
local number, at = 1, 1 -- of the present question, and the byte after what is read of them
local operation, name
local answers = {}

-- new keys ------------------------------------------------------------------------------------------

-- Most questions are the first about a key. What it is granted follows from the limits and the costs. So it is found
-- here, without what the rest of the script needs, most of which is the time to define its functions. It comes to the
-- same: tests/cluster/test_new_keys.py holds the two against each other. The state is written as cmsgpack reads it, of
-- limits without a rest in their arithmetic: windows, and buckets with den 1, where all are multiples of a token.

-- Of the numbers of a question: the state, its life (ms), and the answer. nil: not so simple.
local function granted(once, numbers)
  local batch = 4
  for i = 0, count - 1 do
    local kind, n, _, burst, num, den = struct.unpack('<dddddd', limits, 56 * i + 1)
    local cost, kept, _, _, _, left = struct.unpack('<dddddd', numbers, 48 * i + 1)
    if kind == 0 then n = burst end
    if kind == 3 or kind == 0 and (den ~= 1 or burst * num >= BIG) or cost <= 0 or kept ~= 0 or left ~= 0 then
      return nil
    end
    batch = min(batch, floor((n - once * cost) / 2 / cost), floor(MOST / cost))
  end
  if batch < 1 then return nil end
  local states, places, paces, buckets, life = '', '', '', 0, ACTIVE
  local answer = struct.pack('<dddddd', 1, batch, 0, 0, 0, 0)
  for i = 0, count - 1 do
    local kind, n, per, burst, num, _, lease = struct.unpack('<ddddddd', limits, 56 * i + 1)
    local tokens = (once + batch) * struct.unpack('<d', numbers, 48 * i + 1)
    if kind == 0 then
      local ahead = tokens * num
      states = states .. struct.pack('>c7BdBdBdBdBdc2Bdc14B', '\136\161k\000\161r\149', 203, n, 203, per, 203, burst,
        203, num, 203, 1, '\161a', 203, ahead, '\161w\000\161c\000\161p\000\161s\000\161o', i + 1)
      places, paces = places .. struct.pack('>Bd', 203, -1 - ahead), paces .. struct.pack('>BBd', i + 1, 203, num)
      buckets, life = buckets + 1, max(life, lease, ceil(ahead / 1000))
      answer = answer .. struct.pack('<ddddddd', tokens, ahead, lease, 0, 0, 0, 0)
    else
      states = states .. struct.pack('>c3Bc3BdBdc2Bdc2Bdc11B', '\136\161k', kind, '\161r\146', 203, n, 203, per,
        '\161w', 203, per, '\161c', 203, tokens, '\161a\000\161p\000\161s\001\161o', i + 1)
      places, life = places .. '\001', max(life, kind * per)
      answer = answer .. struct.pack('<ddddddd', tokens, per, per, 0, kind == 2 and tokens or 0, 0, now + per)
    end
  end
  local fields, more = 133, ''
  if buckets > 0 then fields, more = fields + 1, '\161i' .. string.char(128 + buckets) .. paces end
  if sealed then fields, more = fields + 1, more .. '\161k' .. cmsgpack.pack(name) end
  local state = struct.pack('>c3Bdc2B', '\131\161t', 203, now, '\161l', 144 + count) .. states .. '\161h\129'
    .. cmsgpack.pack(host) .. struct.pack('>Bc2Bdc2Bdc2Bc5B', fields, '\161t', 203, now, '\161g', 203, now, '\161b',
      batch, '\161o\001\161p', 144 + count) .. places .. more
  return {state, string.format('%.0f', ceil(min(life, BIG / 2) / 1000) + 1000), answer}
end

-- Reads the present question, but for its numbers. Returns whether it was answered.
local known_grants = {{}, false, {}} -- of take and ahead, by the numbers of the question
local function answer_new(key)
  operation, name, at = struct.unpack('<BI4c0', questions, at)
  local known = known_grants[operation]
  if not known then return false end
  local numbers = string.sub(questions, at, at + 48 * count - 1)
  local grant = known[numbers]
  if grant == nil then
    grant = granted(operation == 1 and 1 or 0, numbers) or false
    if not sealed then known[numbers] = grant end -- else the state has the key's name
  end
  if not grant or not redis.call('SET', key, grant[1], 'PX', grant[2], 'NX') then return false end
  at = at + #numbers
  answers[number] = grant[3]
  return true
end
while number <= #KEYS and answer_new(KEYS[number]) do number = number + 1 end
if number > #KEYS then return table.concat(answers) end

-- all keys ------------------------------------------------------------------------------------------

local OPERATIONS = {'take', 'single', 'ahead', 'look', 'give', 'charge', 'fill', 'refund', 'block', 'reset'}
local PACKED = '<' .. string.rep('d', 6 + 7 * count)
local rules = {} -- and, of the present question, what it says of each
for i = 1, count do
  local kind, n, per, burst, num, den, lease = struct.unpack('<ddddddd', limits, 56 * i - 55)
  rules[i] = {kind = kind, n = n, per = per, burst = burst, num = num, den = den, lease = lease}
end

-- Of the present question. state: of its key; me: of the host in it. Of each limit, place: where its state is in
-- state.l; states, labels: that state, and the label of it. known: labels of all in state.l; taken: whether one belongs
-- to a limit. back: us that the server's clock went back.
local state, junk, back
local known, place, taken, states, labels
local op, me, hosts
local admitted, batch, wait, back_off, refused, redated

-- arithmetic ----------------------------------------------------------------------------------------

-- cost * num / den without a product beyond 2^53: num = whole * den + part
local function times(r, cost, round)
  local whole = floor(r.num / r.den)
  local part = r.num - whole * r.den
  return cost * whole + round(cost * part / r.den)
end
local function increment(r, cost) return times(r, cost, ceil) end
local function most(r) return r.kind == 0 and r.burst or r.n end
local function room(r, cost) return times(r, r.burst - cost, floor) end

local function numbers(r)
  if r.kind == 0 then return {r.n, r.per, r.burst, r.num, r.den} end
  return {r.n, r.per}
end
local function labelled(m)
  local r = m.r
  return {kind = m.k, n = r[1], per = r[2], burst = r[3], num = r[4], den = r[5]}
end
local function is_label(r, m)
  local l = m.r
  return r.kind == m.k and r.n == l[1] and r.per == l[2]
         and (r.kind ~= 0 or r.burst == l[3] and r.num == l[4] and r.den == l[5])
end

local function fresh(r, s)
  return {k = r.kind, r = numbers(r), a = 0, w = 0, c = 0, p = 0, s = s, e = r.kind == 3 and 0 or nil}
end

-- Begin a window, as of now.
local function begin(r, m)
  m.w = r.per
  if r.kind ~= 3 then return end
  for _, at in ipairs({r.burst or 0, r.num or 0, r.den or 0}) do
    if at > now then
      m.w = at - now
      break
    end
  end
  m.e = now + m.w
end

-- How much longer a window lasts for its debt: per / n a token.
local function debt(r, m) return m.c > r.n and ceil((m.c - r.n) * r.per / r.n) or 0 end

-- us until nothing is consumed
local function over(r, m)
  if r.kind == 0 then return m.a / 1000 end
  if r.kind == 3 then return max(0, m.w) end
  return max(0, m.w + (r.kind == 1 and debt(r, m) or m.c > 0 and r.per or 0))
end

-- Let time pass. r is the label of m, here and below, where it is not said to be another.
local function advance(r, m, span)
  if r.kind == 0 then
    m.a = max(0, m.a - span * 1000)
  elseif r.kind == 1 or r.kind == 3 then
    m.w = r.kind == 3 and m.e - now or m.w - span
    if r.kind == 3 and m.w > LONGEST then begin(r, m) end
    if over(r, m) == 0 then m.w, m.c = 0, 0 end
  elseif m.w > span then
    m.w = m.w - span
  elseif m.w > 0 then
    local late = span - m.w
    if late < r.per and m.c > 0 then
      m.p, m.c, m.w, m.s, m.h, m.g = m.c, 0, r.per - late, m.s + 1, m.g, nil
    else
      m.p, m.c, m.w, m.h, m.g = 0, 0, 0, nil, nil
    end
  end
end

-- previous * left / per, rounded up
local function weight(previous, left, per)
  left = min(left, per)
  while previous * left >= 4503599627370496 do left, per = ceil(left / 2), floor(per / 2) end
  return ceil(previous * left / per)
end

-- Whole tokens in a bucket.
local function whole(r, m)
  local tokens = floor(m.a * r.den / r.num) + 1
  for _ = 1, 3 do -- (beyond 2^53 more steps would lead nowhere)
    if increment(r, tokens) > m.a then tokens = tokens - 1 end
  end
  return tokens
end

local function used(r, m)
  if r.kind == 2 then return m.c + weight(m.p, m.w, r.per) end
  if r.kind ~= 0 then return m.c end
  local tokens = whole(r, m)
  return increment(r, tokens) < m.a and tokens + 1 or tokens
end

-- The same tokens under another limit than their label: r.
local function under(r, label, m)
  local u = fresh(r, m.s)
  if label.kind ~= r.kind or (r.kind == 2 and label.per ~= r.per) then
    local tokens = used(label, m)
    if r.kind == 0 then
      u.a = min(increment(r, tokens), BIG)
    elseif tokens > 0 then
      begin(r, u)
      u.c = tokens
      if r.kind + label.kind == 4 and r.kind ~= 2 and m.w > 0 then -- it goes on to its end
        u.w, u.e = m.w, r.kind == 3 and now + m.w or nil
      end
    end
    if label.kind ~= r.kind then u.s = m.s + 1 end -- earlier grants are not given back
  elseif r.kind == 0 then
    u.a = m.a
    if r.num * label.den ~= label.num * r.den then -- what is no whole token is rounded up
      local tokens = whole(label, m)
      local part = m.a - increment(label, tokens)
      u.a = increment(r, tokens) + ceil(part * ((r.num * label.den) / (label.num * r.den)))
    end
    u.a = min(u.a, BIG)
  else
    u.w, u.c, u.p, u.g, u.h, u.e = m.w, m.c, m.p, m.g, m.h, m.e
    if over(r, u) == 0 then u.w, u.c = 0, 0 end
  end
  return u
end

-- Tokens that fit now.
local function available(r, m)
  if r.kind ~= 0 then return max(0, r.n - used(r, m)) end
  local fits = min(r.burst, max(0, r.burst - ceil(m.a * r.den / r.num)))
  for _ = 1, 3 do
    if fits < r.burst and room(r, fits + 1) >= m.a then fits = fits + 1 end
  end
  for _ = 1, 5 do
    if fits > 0 and room(r, fits) < m.a then fits = fits - 1 end
  end
  return room(r, fits) < m.a and 0 or fits
end

local function charge(r, m, cost)
  if cost == 0 then return end
  if r.kind == 0 then
    m.a = min(m.a + increment(r, cost), BIG)
  else
    if m.w <= 0 and m.c == 0 then
      begin(r, m)
      m.s = m.s + 1
    end
    m.c = min(m.c + cost, USED)
  end
end

-- How far into a window `full` tokens of the one before leave room.
local function room_at(r, full, room)
  if full <= room then return 0 end
  return r.per - floor(room * r.per / full)
end

-- us until no more than `n` less the cost is consumed
local function until_room(r, m, cost, n)
  if r.kind == 0 then return ceil(max(0, m.a - times(r, n - cost, floor)) / 1000) end
  if used(r, m) + cost <= n then return 0 end
  if r.kind ~= 2 then return max(1, over(r, m)) end
  if m.c + cost <= n then return max(1, room_at(r, m.p, n - m.c - cost) - (r.per - m.w)) end
  return max(1, m.w + room_at(r, m.c, n - cost))
end

-- the state -----------------------------------------------------------------------------------------

local function are_within(x, low)
  for j, v in pairs(x) do
    if not within(j, 1, 2 * PLACES) or not within(v, low, BIG) then return false end
  end
  return true
end
local function is_host(h)
  return h.t >= -BIG and h.t <= BIG and h.g >= -BIG and h.g <= BIG and h.b >= 0 and h.b <= BIG
         and (not h.r or within(h.r, -BIG, BIG)) and (not h.p or are_within(h.p, -BIG - 1))
         and (not h.i or are_within(h.i, 1e-9)) and (not h.k or type(h.k) == 'string')
end
local function is_limit(m)
  local r = m.r
  for j = 1, #r do
    if not within(r[j], 1, BIG) then return false end
  end
  if m.k == 0 then
    if #r ~= 5 or r[5] > 67108864 or r[3] * (r[4] / r[5] + 1) > 4503599627370496 then return false end
  elseif #r ~= 2 or r[1] > USED or m.k ~= 1 and m.k ~= 2 and m.k ~= 3 then
    return false
  elseif m.k == 3 and not within(m.e, 0, BIG) then
    return false
  end
  return within(m.a, 0, BIG) and within(m.w, -BIG, BIG) and within(m.c, 0, USED) and within(m.p, 0, USED)
         and within(m.s, -BIG, BIG) and (not m.o or within(m.o, 1, PLACES)) and (not m.f or within(m.f, 0, 3))
         and (not m.q or within(m.q, 1, BIG)) and within(m.g or 0, 0, BIG) and within(m.h or 0, 0, BIG)
end
local function is_state(found)
  if not within(found.t, 0, BIG) or #found.l > PLACES + 4 then return false end
  local limits = 0
  for _ in pairs(found.l) do limits = limits + 1 end
  if limits ~= #found.l then return false end
  for _, m in ipairs(found.l) do
    if not is_limit(m) then return false end
  end
  for id, h in pairs(found.h) do
    if type(id) ~= 'string' or not is_host(h) then return false end
  end
  return true
end

-- Returns whether there was a state of ours.
local function load(key)
  known, place, taken, states, labels = {}, {}, {}, {}, {}
  state = state_at(key, is_state)
  junk = state == false
  if not state then
    state, back, hosts = {t = now, l = {}, h = {}}, 0, 1
    if junk then state.x = 1 end
    for i, r in ipairs(rules) do
      local m = fresh(r, 0)
      if junk then
        m.o = i
        begin(r, m)
        if r.kind == 0 then m.a, m.w = min(increment(r, r.burst), BIG), 0 else m.c = r.n end
      end
      state.l[i], states[i], known[i], labels[i], place[i], taken[i] = m, m, r, r, i, true
    end
    return false
  end
  local span = max(0, now - state.t)
  back = max(0, state.t - now) -- the clock went back by this much: so do instants
  state.t = now
  for j, m in ipairs(state.l) do
    local r = rules[j]
    known[j] = r and is_label(r, m) and r or labelled(m)
    advance(known[j], m, span)
  end
  return true
end

-- Which state belongs to which limit: one of its kind and period, else the next of those that were in force, else
-- (it is a new limit) an empty one. One that was in force has a limit that goes on from it, as long as there
-- are enough: a limit of its kind and period that was there before does not go ahead of it.
local function alike(r, m) return (m.f or m.k) == r.kind and (m.q or m.r[2]) == r.per end
local function find_places()
  local as_before = #state.l == count
  for i, r in ipairs(rules) do
    as_before = as_before and state.l[i].o == i and alike(r, state.l[i])
    place[i], taken[i] = i, true
  end
  if as_before then return end
  place, taken = {}, {}
  local order = {}
  for j in ipairs(state.l) do order[j] = j end
  table.sort(order, function(a, b)
    return (state.l[a].o or PLACES + a) < (state.l[b].o or PLACES + b)
  end)
  local function match(fits)
    for i, r in ipairs(rules) do
      for _, j in ipairs(order) do
        if not place[i] and not taken[j] and fits(r, state.l[j], known[j]) then
          place[i], taken[j] = j, true
        end
      end
    end
  end
  match(function(r, m) return m.o and alike(r, m) end)
  match(function(r, m, label)
    local heirs = count
    for _ in pairs(place) do heirs = heirs - 1 end
    for j, one in ipairs(state.l) do if one.o and not taken[j] then heirs = heirs - 1 end end
    return heirs > 0 and not m.o and alike(r, m) and used(label, m) > 0
  end)
  match(function(_, m) return m.o end)
  match(function(_, m, label) return over(label, m) == 0 end)
  if #state.l >= PLACES then match(function() return true end) end
  for i, r in ipairs(rules) do
    if not place[i] then
      local j = #state.l + 1
      place[i], taken[j], state.l[j], known[j] = j, true, fresh(r, 0), r
    end
  end
end

-- The state of a limit under the present limit.
local function seen(i)
  return labels[i] == rules[i] and states[i] or under(rules[i], labels[i], states[i])
end
local function adopt(i, u)
  states[i], labels[i], state.l[place[i]] = u, rules[i], u
end

-- The name of the window that is present, as long as it lasts; 0: of a bucket, or nothing is used. It is the end without
-- debt, by this clock: `w` falls as `now` grows. Where the clock goes back, the window has another name as of then. Of
-- the calendar a window that begins anew has the same end: so the name has the serial number too (ends are whole
-- minutes).
local function window(r, u)
  if r.kind == 0 or used(r, u) == 0 then return 0 end
  return r.kind == 3 and u.e + u.s % 1000000 or now + u.w
end
local function find_labels()
  for i, r in ipairs(rules) do
    local m, label = state.l[place[i]], known[place[i]]
    states[i], labels[i] = m, label
    if label == r or is_label(r, m) then
      labels[i] = r
    else
      local u = under(r, label, m)
      if over(r, u) <= over(label, m) then adopt(i, u) end
    end
  end
end
-- Where something is charged or given back, it is under the present limit if that has room for what there is.
local function adopt_fitting(i)
  local r, u = rules[i], seen(i)
  if r.kind == 0 and u.a <= room(r, 0) or r.kind ~= 0 and used(r, u) <= r.n then adopt(i, u) end
end

-- us until the cost fits; -1: never. While it does not, the state stays under its label, or goes by the present
-- limit, whichever is sooner.
local function retry(i, cost)
  local r = rules[i]
  if cost > most(r) then return -1 end
  local wait = until_room(r, seen(i), cost, most(r))
  if labels[i] == r then return wait end
  return min(wait, until_room(labels[i], states[i], cost, most(r)))
end

-- Hosts that want a share, this one included. One that is idle may be forgotten.
local function count_hosts()
  local others, idle = 0, {}
  hosts = 1
  for id, h in pairs(state.h) do
    h.t, h.g, h.r = min(h.t - back, now), min(h.g - back, now), h.r and min(h.r - back, now)
    others = others + 1
    if id ~= host and h.t > now - ACTIVE then hosts = hosts + 1 end
    if id ~= host and h.t < now - FORGET then idle[#idle + 1] = id end
  end
  if others > 64 then
    for _, id in ipairs(idle) do state.h[id] = nil end
  end
end

-- A host that is not in this state, and knows more than is in it: the state was lost (a restart without persistence,
-- a failover). It is restored from what the hosts knew last. That includes what all processes of a host admitted
-- during an outage: while each process reports its own part, by `fill`, it would count twice. So `fill` does not add
-- the host. (It may also be a host that was forgotten: then all that it knows is in the state, or was given back.) Nor
-- does `refund`, which says nothing of what the host knows: the `look` before it did.
local function find_me()
  me = state.h[host]
  if me then return end
  me = {t = now, g = now, b = 0}
  if op == 'fill' or op == 'refund' then return end
  state.h[host] = me
  if state.x then return end
  for i, r in ipairs(rules) do
    local m, label = states[i], labels[i]
    if label.kind ~= r.kind then
      -- what it knows is in terms of another kind
    elseif r.kind == 0 then
      m.a = max(m.a, label == r and r.left or ceil(r.left * ((label.num * r.den) / (r.num * label.den))))
      m.a = min(m.a, BIG)
    elseif r.left > 0 and r.used + r.previous > 0 then
      local c, p, left = r.used, r.previous, min(r.left, r.per)
      if m.w <= 0 and m.c == 0 then
        if r.kind == 3 then begin(r, m) else m.w = left end
        m.s = m.s + 1
      elseif r.kind == 2 and left < m.w - r.per / 2 then -- sent before this window began
        c, p = 0, c
      elseif r.kind == 2 and left > m.w + r.per / 2 then
        m.p, m.c, m.w, m.s, m.h, m.g = m.c, 0, left, m.s + 1, m.g, nil
      end
      -- what hosts know of a sliding window does not include what they admitted during an outage
      m.c = max(m.c, c + (m.g or 0))
      if r.kind == 2 then m.p = max(m.p, p + (m.h or 0)) end
      if r.kind == 1 and m.c > label.n and m.c == c then -- it was not under this limit that it was used
        m.r = {c, m.r[2]}
        labels[i] = labelled(m)
      end
    end
  end
end

-- Give back what the host was granted and has not spent, less what has drained since.
local function give_back(i, tokens)
  local r, m, at = labels[i], states[i], me.p and me.p[place[i]]
  if tokens == 0 or not at then return end
  if r.kind == 0 then
    local was, pace = at < 0 and me.i and me.i[place[i]], r.num / r.den
    if not was then return end
    local gone, back = (now - me.g) * 1000, increment(r, tokens)
    if was == pace then
      back = min(back, max(0, -1 - at - gone))
    else
      back = min(back, floor(max(0, (-1 - at) / was - gone / min(was, pace)) * pace))
    end
    m.a = max(0, m.a - back)
  elseif m.s == at then
    m.c = m.c - min(m.c, tokens)
  elseif r.kind == 2 and m.s == at + 1 then
    m.p = m.p - min(m.p, tokens)
  end
end

-- operations ----------------------------------------------------------------------------------------

-- Do all limits have room for `times` of the cost?
local function fits(n)
  for i, r in ipairs(rules) do
    local u, cost = seen(i), n * r.cost
    if r.kind == 0 and n > 0 then
      if cost > r.burst or room(r, cost) < u.a then return false end -- in debt, a cost of 0 does not fit
    elseif cost > 0 and available(r, u) < cost then
      return false
    end
  end
  return true
end
local function charge_all(n)
  for i, r in ipairs(rules) do
    if n * r.cost > 0 then
      adopt(i, seen(i))
      charge(r, states[i], n * r.cost)
    end
  end
end

-- Ask the other hosts to give back what they hold. Returns whether some may do so soon.
local function recall()
  local hope, ask = false, false
  local message = {sealed and 'M' or 'm', limiter, sealed and '' or name}
  -- and each host that seals names, with its own name of the key
  for id, h in pairs(state.h) do
    if id ~= host and h.o then
      if not h.r or now - h.r > REPEAT then
        h.r, ask = now, true
        if h.k then message[#message + 1], message[#message + 2] = id, h.k end
      end
      hope = hope or now - h.r < RECALL
    end
  end
  if ask then redis.call('PUBLISH', channel, cmsgpack.pack(message)) end
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
      n = min(n, floor(available(r, seen(i)) / (hosts + 1) / r.cost), floor((MOST - r.kept) / r.cost))
    end
  end
  return asks and max(0, n) or 0
end

-- take, single, ahead
local function grant()
  local once = op == 'ahead' and 0 or 1
  if op == 'take' then
    for i, r in ipairs(rules) do give_back(i, r.given) end
  end
  -- Leased tokens of a bucket are given back and taken again, as of now, so that their lease begins anew with the
  -- batch's. Where that does not fit, they end as they would have.
  local before, whole = {}, op ~= 'single'
  for i, r in ipairs(rules) do
    if r.kind == 0 and labels[i].kind == 0 and r.kept > 0 and whole then
      before[i] = states[i].a
      give_back(i, r.kept)
      local fit = r.kept + once * r.cost
      whole = fit <= r.burst and available(r, seen(i)) >= fit
    end
  end
  for i, r in pairs(before) do
    if whole then
      adopt(i, seen(i))
      charge(rules[i], states[i], rules[i].kept)
      redated[i] = true
    else
      states[i].a = r
    end
  end
  if fits(once) then
    charge_all(once)
    if whole then
      batch = size()
      charge_all(batch)
      me.p = me.p or {}
      for i, label in ipairs(labels) do
        local j = place[i]
        if label.kind == 0 then
          me.i = me.i or {}
          me.p[j], me.i[j] = -1 - states[i].a, label.num / label.den
        else
          me.p[j] = states[i].s
        end
      end
    end
    if whole then
      me.g, me.b, me.o = now, max(batch, 1), nil
      me.k = sealed and name or nil
      for _, r in ipairs(rules) do
        if batch > 0 or r.kept > 0 then me.o = 1 end
      end
      if batch > 0 then me.r = nil end
    end
    -- Those were the last tokens: the next request is worth it when some have come back.
    if once > 0 and batch == 0 and not fits(1) then
      for i, r in ipairs(rules) do
        if r.kind ~= 1 and r.kind ~= 3 then
          local some = r.kind == 0 and r.burst * r.num / r.den / 2000 or r.per / 20
          back_off = max(back_off, min(BACK_OFF, max(retry(i, r.cost), floor(some))))
        end
      end
    end
  else
    admitted = 0
    for i, r in ipairs(rules) do
      local t = retry(i, r.cost)
      if wait ~= -1 and (t == -1 or t > wait) then
        wait, refused = t, i - 1
      end
    end
    local hope = recall()
    back_off = wait == -1 and VERIFY or hope and BACK_OFF or min(max(wait, BACK_OFF), VERIFY)
    me.b = floor(me.b / 2)
  end
end

local function run()
  if op == 'give' then
    for i, r in ipairs(rules) do give_back(i, r.given) end
    me.o = nil
  elseif op == 'take' or op == 'single' or op == 'ahead' then
    grant()
  elseif op == 'look' then
    admitted = fits(1) and 1 or 0
    for i, r in ipairs(rules) do
      local t = admitted == 0 and retry(i, r.cost) or 0
      if wait ~= -1 and (t == -1 or t > wait) then
        wait, refused = t, i - 1
      end
    end
  elseif op == 'charge' or op == 'fill' then
    for i, r in ipairs(rules) do
      adopt_fitting(i)
      local cost, m = r.cost, states[i]
      if op == 'fill' then
        cost = min(cost, available(r, seen(i)))
        m.g = labels[i].kind == 2 and (m.g or 0) + cost or nil
      end
      charge(labels[i], m, cost)
    end
  elseif op == 'block' then
    for i, r in ipairs(rules) do
      give_back(i, r.given)
      if r.kind == 0 and r.cost > 0 then
        if labels[i].kind ~= 0 then adopt(i, seen(i)) else adopt_fitting(i) end
        states[i].a = min(max(states[i].a, r.cost + times(labels[i], r.burst - 1, floor)), BIG)
      end
    end
    me.o = nil
  elseif op == 'refund' then
    for i, r in ipairs(rules) do
      local present = window(r, seen(i)) -- as it was told
      adopt_fitting(i)
      local label, m = labels[i], states[i]
      if label.kind == 0 then
        m.a = max(0, m.a - increment(label, r.cost))
      elseif r.kind ~= 0 and (r.left == 0 or r.left ~= present) then
        -- another window. A sliding one may be the one before, which still counts.
        if label.kind == 2 and r.kind == 2 and r.left > 0 and r.left + label.per == present then
          m.p = m.p - min(m.p, r.cost)
        end
      elseif label.kind ~= 2 then
        m.c = m.c - min(m.c, r.cost)
        if over(label, m) == 0 then m.w, m.c = 0, 0 end -- without the debt it would be over by now
      else
        local rest = r.cost - min(m.c, r.cost)
        m.c = m.c - (r.cost - rest)
        m.p = m.p - min(m.p, rest)
      end
    end
  elseif op == 'reset' then
    for j, m in ipairs(state.l) do
      state.l[j] = fresh(known[j], m.s + 1) -- earlier grants are not given back
    end
    for i, r in ipairs(rules) do adopt(i, fresh(r, state.l[place[i]].s)) end
    state.h = {}
    state.x = 1
  end
end

local function save(key)
  me.t = now
  for _, m in ipairs(state.l) do
    m.o, m.a, m.w, m.c, m.p = nil, min(m.a, BIG), min(m.w, BIG), min(m.c, USED), min(m.p, USED)
  end
  for i, r in ipairs(rules) do
    local m, other = states[i], labels[i] ~= r
    m.o, m.f, m.q = i, other and r.kind or nil, other and r.per or nil
  end

  -- until nothing of it counts: then the key is as one that was never seen
  local life = ACTIVE
  for j, m in ipairs(state.l) do
    if not taken[j] then life = max(life, ceil(over(known[j], m))) end
  end
  for i, r in ipairs(rules) do
    life = max(life, r.lease, ceil(over(labels[i], states[i])))
    if state.x then life = max(life, 2 * r.per) end -- longer than what any host knows of before
  end
  life = min(life, BIG / 2)
  redis.call('SET', key, cmsgpack.pack(state), 'PX', ceil(life / 1000) + 1000)
end

local function answered()
  local answer = {admitted, batch, wait, back_off, refused, junk and 1 or 0}
  for i, r in ipairs(rules) do
    local u, left = seen(i)
    if r.kind == 0 then left = u.a elseif r.kind == 1 then left = over(r, u) else left = max(0, u.w) end
    if labels[i] ~= r and r.kind == 0 then
      left = min(left, retry(i, 1) * 1000 + room(r, 1))
    elseif labels[i] ~= r and (r.kind == 1 or r.kind == 3) then
      left = min(left, ceil(over(labels[i], states[i])))
    end
    answer[#answer + 1] = r.kind == 0 and r.burst - available(r, u) or used(r, u)
    answer[#answer + 1] = left
    answer[#answer + 1] = r.kind == 0 and r.lease or max(0, u.w)
    answer[#answer + 1] = redated[i] and 1 or 0
    answer[#answer + 1] = r.kind == 2 and u.c or 0
    answer[#answer + 1] = r.kind == 2 and u.p or 0
    answer[#answer + 1] = max(0, window(r, u))
  end
  for i, x in ipairs(answer) do answer[i] = min(BIG, x) end -- in this order NaN is BIG
  return struct.pack(PACKED, unpack(answer))
end

repeat
  for _, r in ipairs(rules) do
    r.cost, r.kept, r.given, r.used, r.previous, r.left, at = struct.unpack('<dddddd', questions, at)
  end
  op, admitted, batch, wait, back_off, refused, redated = OPERATIONS[operation], 1, 0, 0, 0, 0, {}
  if load(KEYS[number]) then
    find_places()
    find_labels()
    count_hosts()
  end
  find_me()
  run()
  save(KEYS[number])
  answers[number] = answered()
  repeat number = number + 1 until number > #KEYS or not answer_new(KEYS[number])
until number > #KEYS
return table.concat(answers)
