-- Shared head of every script. All keys of one tenant lie in one slot; time is the store's own, in microseconds.
-- Numbers are integers below 2^53, which a Lua double keeps exactly; `integer` writes them, because tostring(1e15) is "1e+15".
--
-- meta          hash  history | epoch | version, families, loaded_us, stems | nonce, nonce_us, loaded_parts | outstanding | cursor
-- reservations  hash  id -> record, packed: see `fields of a record`
-- leases        zset  held ids by the end of their lease; those of uses of units so much earlier that none counts as a running call
-- counters      hash  name -> a sliding window's log, packed | name@<start of the period> -> used, held and pinned
-- ended         zset  ids that have ended, by when; kept until their Reserve is too old to be repeated
-- waiters       hash  ids that wait for their turn -> ticket, packed: see waiting.lua; it goes by itself when nobody renews it
-- guard         hash  of a tenant that is or was kept out: see guard.lua; no rebuild lifts it, and it goes by itself
-- uses          hash  id -> record of units that were used at once, which no ledger may have: a change of rules leaves them, unlike `reservations`
local meta, reservations, leases, counters, ended, waiters, guard, uses = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local call = redis.call
local CHUNK = 500 -- bounded arguments a command: unpack() has a stack limit

local function integer(n)
  return string.format('%d', n)
end

-- The name of the history this server's data has had since it began to lead. It is drawn anew whenever data may have gone back in time: by a start
-- (an older file may have been loaded) and by a promotion (the replica may have lagged), also of a server that led before and kept running.
-- Asked here and not once a connection, because a server can be demoted and promoted again while a connection stays open.
local function current_history()
  local told = call('INFO', 'replication')
  local _, before = string.find(told, 'master_replid:', 1, true)
  return string.sub(told, before + 1, before + 40)
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
  call('DEL', meta, reservations, leases, counters, ended, waiters, uses)
end

local function store_time()
  local t = call('TIME')
  return tonumber(t[1]) * 1000000 + tonumber(t[2])
end

-- Whether the loaded counters are those that a configuration needs, told by a digest of their families: 'same', 'behind' (they were loaded for a
-- newer configuration) or 'others'.
local function fit(loaded, loaded_version, needed, version)
  if loaded == needed then
    return 'same'
  end
  return loaded and tonumber(loaded_version) > tonumber(version) and 'behind' or 'others'
end

-- Units and states, as numbers.
local REQUESTS, TOKENS, COST, RUNNING, RETRIES, PRODUCT = 1, 2, 3, 4, 5, 6
local HELD, PINNED, SETTLED, VOID, RELEASED, SLICED = 1, 2, 3, 4, 5, 6

-- Fields of a record. ASKED_… are of the Reserve, to know it when it is repeated. SHADOW_… are what rules in shadow mode were charged.
-- CHARGES: by threes the counter's name, its unit (+ SHADED for one of shadow rules), its window (0: a calendar's); none once it has ended.
local STATE, EPOCH, RESERVED, R_TOKENS, R_COST, QUANTITY, USER, FEATURE, ATTEMPT, PRODUCT_UNIT = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10
local ASKED_TOKENS, ASKED_COST, OUTPUT, SHADOW_TOKENS, SHADOW_COST, CHARGES = 11, 12, 13, 14, 15, 16
local SHADED = 10

-- So much earlier. Below 0 no time of a clock comes near what is left.
local USES_EARLIER = 2 ^ 52

-- The score of a lease that ends then.
local function lease_score(until_us, attempt)
  return attempt == 0 and until_us - USES_EARLIER or until_us
end

local function lives(score, now)
  return score and (score < 0 and score + USES_EARLIER or score) > now
end

-- What the scores of ended leases lie between: of uses, of calls.
local function ended_between(now)
  return { { '-inf', integer(now - USES_EARLIER) }, { '0', integer(now) } }
end

local function count_ended(now)
  local count = 0
  for _, scores in ipairs(ended_between(now)) do
    count = count + call('ZCOUNT', leases, scores[1], scores[2])
  end
  return count
end

-- Values of a hash, in any number.
local function fetch(key, names)
  if #names <= CHUNK then
    return #names > 0 and call('HMGET', key, unpack(names)) or {}
  end
  local found = {}
  for from = 1, #names, CHUNK do
    local to = math.min(from + CHUNK - 1, #names)
    for i, value in ipairs(call('HMGET', key, unpack(names, from, to))) do
      found[from + i - 1] = value
    end
  end
  return found
end

local function in_chunks(command, key, arguments)
  if #arguments > 0 and #arguments <= CHUNK then
    call(command, key, unpack(arguments))
    return
  end
  for from = 1, #arguments, CHUNK do
    call(command, key, unpack(arguments, from, math.min(from + CHUNK - 1, #arguments)))
  end
end

local function record(id)
  local packed = call('HGET', reservations, id)
  return packed and cmsgpack.unpack(packed)
end

-- Of these ids those that have a record, of either kind.
local function records_of(ids)
  local found, others = {}, {}
  for i, packed in ipairs(fetch(reservations, ids)) do
    found[ids[i]] = packed and cmsgpack.unpack(packed) or nil
    others[#others + 1] = not packed and ids[i] or nil
  end
  for i, packed in ipairs(fetch(uses, others)) do
    found[others[i]] = packed and cmsgpack.unpack(packed) or nil
  end
  return found
end

-- An idle tenant's data may go: that is a loss of data, which the ledger makes good. meta goes first, as its epoch is what the rest hangs on.
local IDLE_META_SECONDS, IDLE_REST_SECONDS = 40 * 86400, 41 * 86400

local function idle_rest()
  for _, key in ipairs({ reservations, leases, counters, ended, uses }) do
    call('EXPIRE', key, IDLE_REST_SECONDS)
  end
end

local function idle()
  call('EXPIRE', meta, IDLE_META_SECONDS)
  idle_rest()
end

local function busy()
  for _, key in ipairs({ meta, reservations, leases, counters, ended, uses }) do
    call('PERSIST', key)
  end
end

local function outstanding(change)
  if change == 0 then
    return
  end
  local left = call('HINCRBY', meta, 'outstanding', change)
  if left == 0 then
    idle()
  elseif change > 0 and left == change then
    busy()
  end
end

-- Forgets ended records nobody can reserve again; a bounded number at a time.
local function tidy(now, forget_us)
  local gone = call('ZRANGEBYSCORE', ended, '-inf', integer(now - forget_us), 'LIMIT', 0, CHUNK)
  if #gone > 0 then
    call('HDEL', reservations, unpack(gone))
    call('HDEL', uses, unpack(gone))
    call('ZREM', ended, unpack(gone))
  end
end
