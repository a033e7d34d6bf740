-- Shared head of every script. All keys of one tenant lie in one slot; time is the store's own, in microseconds.
-- Numbers are integers below 2^53, which a Lua double keeps exactly; `integer` writes them, because tostring(1e15) is "1e+15".
--
-- meta          hash  history | epoch | nonce, nonce_us, loaded_parts | window_tokens, outstanding, day | tokens_used:<day> tokens_held:<day> cost_used:<month> cost_held:<month>
-- reservations  hash  id -> "<state> <epoch> <reserve_us> <tokens> <cost>"; state: held pinned settled void released
-- leases        zset  held ids by the end of their lease
-- window        zset  counted ids by reserve_us; window_tokens is the sum of their records' tokens, evicted or not
-- ended         zset  ids that have ended, by when; kept until their Reserve is too old to be repeated
local meta, reservations, leases, window, ended = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local call = redis.call
local CHUNK = 500 -- bounded arguments a command: unpack() has a stack limit

local function integer(n)
  return string.format('%.0f', n)
end

-- The name of the history this server's data has had since it began to lead. It is drawn anew whenever data may have gone back in time: by a start
-- (an older file may have been loaded) and by a promotion (the replica may have lagged), also of a server that led before and kept running.
-- Asked here and not once a connection, because a server can be demoted and promoted again while a connection stays open.
local function current_history()
  return string.match(call('INFO', 'replication'), 'master_replid:(%x+)')
end

-- Fields of meta, none if meta is of another history. Data that may have gone back counts as lost, because nothing else can be told of it: calls
-- admitted since would be missing, and a hold that a commit ended since would come back for good, as no commit is sent twice. The ledger has both.
-- A nonce of another history is as void: what the commits that waited for it were told may be lost with it. Names never return, so nor does the nonce.
-- The second result is the data's being of another history.
local function current(...)
  local m = call('HMGET', meta, 'history', ...)
  if m[1] ~= current_history() then
    return {}, true
  end
  table.remove(m, 1)
  return m, false
end

local function current_epoch()
  return current('epoch')[1]
end

local function forget_all()
  call('DEL', meta, reservations, leases, window, ended)
end

local function store_time()
  local t = call('TIME')
  return tonumber(t[1]) * 1000000 + tonumber(t[2])
end

-- The UTC day and month of a moment: "2026-01-31", "2026-01". Source: H. Hinnant, civil_from_days.
local function dates(us)
  local z = math.floor(us / 86400000000) + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local day = doy - math.floor((153 * mp + 2) / 5) + 1
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  local text = string.format('%04d-%02d', year, month)
  return string.format('%s-%02d', text, day), text
end

local function unpacked(packed)
  local state, epoch, reserve_us, tokens, cost = string.match(packed, '^(%a+) (%d+) (%d+) (%d+) (%d+)$')
  return { state = state, epoch = tonumber(epoch), reserve_us = tonumber(reserve_us), tokens = tonumber(tokens), cost = tonumber(cost) }
end

local function record(id)
  local packed = call('HGET', reservations, id)
  return packed and unpacked(packed)
end

local function keep(id, r)
  call('HSET', reservations, id, string.format('%s %.0f %.0f %.0f %.0f', r.state, r.epoch, r.reserve_us, r.tokens, r.cost))
end

local function add(field, amount)
  if amount ~= 0 then
    call('HINCRBY', meta, field, integer(amount))
  end
end

-- Sums the tokens of the given ids, all of which have a record.
local function tokens_of(ids)
  local sum = 0
  for from = 1, #ids, CHUNK do
    local packed = call('HMGET', reservations, unpack(ids, from, math.min(from + CHUNK - 1, #ids)))
    for _, text in ipairs(packed) do
      sum = sum + tonumber(string.match(text, '(%d+) %d+$'))
    end
  end
  return sum
end

-- What is used now. Reads only: entries that have left the window are subtracted, not evicted.
local function usage(now, window_us)
  local day, month = dates(now)
  local m = call('HMGET', meta, 'window_tokens', 'tokens_used:' .. day, 'tokens_held:' .. day, 'cost_used:' .. month, 'cost_held:' .. month)
  local start = integer(now - window_us)
  local oldest = call('ZRANGEBYSCORE', window, '(' .. start, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
  return {
    start = start,
    requests = call('ZCOUNT', window, '(' .. start, '+inf'),
    tokens_minute = (tonumber(m[1]) or 0) - tokens_of(call('ZRANGEBYSCORE', window, '-inf', start)),
    tokens_day = (tonumber(m[2]) or 0) + (tonumber(m[3]) or 0),
    cost_month = (tonumber(m[4]) or 0) + (tonumber(m[5]) or 0),
    running = call('ZCOUNT', leases, '(' .. integer(now), '+inf'),
    oldest_us = tonumber(oldest[2]) or 0,
  }
end

-- When the window has room for one more request: as many of the oldest must leave as are too many. 0: it has room, or never will.
local function requests_free_us(u, limit, window_us)
  if limit == 0 or u.requests < limit then
    return 0
  end
  local entry = call('ZRANGEBYSCORE', window, '(' .. u.start, '+inf', 'WITHSCORES', 'LIMIT', u.requests - limit, 1)
  return tonumber(entry[2]) + window_us
end

-- When the window has room for `tokens` more. 0: it has room, or never will.
local function tokens_free_us(u, limit, tokens, window_us)
  local excess = tokens - (limit - u.tokens_minute)
  if limit == 0 or excess <= 0 or tokens > limit then
    return 0
  end
  local from = 0
  while true do
    local entries = call('ZRANGEBYSCORE', window, '(' .. u.start, '+inf', 'WITHSCORES', 'LIMIT', from, CHUNK)
    if #entries == 0 then
      return 0
    end
    local ids = {}
    for i = 1, #entries, 2 do
      ids[#ids + 1] = entries[i]
    end
    local packed = call('HMGET', reservations, unpack(ids))
    for i, text in ipairs(packed) do
      excess = excess - tonumber(string.match(text, '(%d+) %d+$'))
      if excess <= 0 then
        return tonumber(entries[2 * i]) + window_us
      end
    end
    from = from + CHUNK
  end
end

-- Whether a call of this size breaks a rule. The limit is compared with what is left of it: both sides stay below 2^53.
local function refused(u, limits, tokens, cost)
  return (limits[1] > 0 and u.requests >= limits[1])
    or (limits[2] > 0 and tokens > limits[2] - u.tokens_minute)
    or (limits[3] > 0 and tokens > limits[3] - u.tokens_day)
    or (limits[4] > 0 and cost > limits[4] - u.cost_month)
    or (limits[5] > 0 and u.running >= limits[5])
end

local function five_limits(from)
  local limits = {}
  for i = 0, 4 do
    limits[i + 1] = tonumber(ARGV[from + i])
  end
  return limits
end

-- The answer's figures: what is used, and when the sliding windows have room for this call.
local function figures(u, limits, tokens, window_us)
  local requests_us, tokens_us = requests_free_us(u, limits[1], window_us), tokens_free_us(u, limits[2], tokens, window_us)
  return u.requests, u.tokens_minute, u.tokens_day, u.cost_month, u.running, u.oldest_us, requests_us, tokens_us
end

-- Forgets what no rule counts any more: entries that left the window, and ended records nobody can reserve again.
-- The window goes first, because the sum of its tokens is read from the records.
local function tidy(now, window_us, forget_us)
  local start = integer(now - window_us)
  local left = call('ZRANGEBYSCORE', window, '-inf', start)
  if #left > 0 then
    add('window_tokens', -tokens_of(left))
    call('ZREMRANGEBYSCORE', window, '-inf', start)
  end
  local gone = call('ZRANGEBYSCORE', ended, '-inf', integer(now - forget_us), 'LIMIT', 0, CHUNK)
  if #gone > 0 then
    for _, id in ipairs(gone) do
      -- Only a clock that stepped back leaves one in the window this long. Without its record its tokens could never be subtracted.
      if call('ZREM', window, id) == 1 then
        add('window_tokens', -record(id).tokens)
      end
    end
    call('HDEL', reservations, unpack(gone))
    call('ZREM', ended, unpack(gone))
  end
end

-- An idle tenant's data may go: that is a loss of data, which the ledger makes good. meta goes first, as its epoch is what the rest hangs on.
local IDLE_META_SECONDS, IDLE_REST_SECONDS = 6 * 3600, 12 * 3600

local function idle_rest()
  for i = 2, 5 do
    call('EXPIRE', KEYS[i], IDLE_REST_SECONDS)
  end
end

local function idle()
  call('EXPIRE', meta, IDLE_META_SECONDS)
  idle_rest()
end

local function busy()
  for i = 1, 5 do
    call('PERSIST', KEYS[i])
  end
end

local function outstanding(change)
  local left = call('HINCRBY', meta, 'outstanding', change)
  if left == 0 then
    idle()
  elseif change > 0 and left == change then
    busy()
  end
end

-- Ends a held or pinned reservation: the hold goes, `tokens` and `cost` were used. `counted`: the request stays in the window.
local function finish(id, r, now, state, tokens, cost, counted)
  local day, month = dates(r.reserve_us)
  add('tokens_held:' .. day, -r.tokens)
  add('cost_held:' .. month, -r.cost)
  add('tokens_used:' .. day, tokens)
  add('cost_used:' .. month, cost)
  if call('ZSCORE', window, id) then
    add('window_tokens', tokens - r.tokens)
    if not counted then
      call('ZREM', window, id)
    end
  end
  call('ZREM', leases, id)
  call('ZADD', ended, integer(now), id)
  r.state, r.tokens, r.cost = state, tokens, cost
  keep(id, r)
  outstanding(-1)
end

local function pin(id, r)
  call('ZREM', leases, id)
  r.state = 'pinned'
  keep(id, r)
end
