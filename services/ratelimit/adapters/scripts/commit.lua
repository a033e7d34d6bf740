-- Applies what the ledger says of calls. ARGV: forget, then five an item: id, epoch, kind (settled | void | pin), tokens, cost.
-- Answers one number an item: 1 done, 2 send again, 3 done and more was used than held, 4 done before with other figures.
--
-- Without an epoch, two cases, argued from rules 5 and 6:
--   A nonce is pending: the snapshot it asked for may have been taken before this settlement (its epoch is then not above the commit's), and loading
--   it would leave a hold that nobody ends. So the commit waits in the outbox and is judged by its epoch once the snapshot has loaded. Cancelling
--   the nonce instead would be safe too, but a stream of late commits could then keep a tenant from ever being rebuilt. The wait is bounded: an
--   unanswered nonce dies with meta's expiry, and with it any snapshot still on its way.
--   No nonce, or one of another history, which nothing will load: whatever loads next was asked for after this moment, so after the ledger committed
--   what it tells here: that snapshot counts it. Done. What is left of another history goes at once, as its tenant may never call again.
-- A newer epoch: the ledger moved on by a rebuild whose answer was not loaded. All state goes, nonce included, which makes it the second case: done.
-- The ledger need not send it again, and a tenant that never calls again leaves nothing in its outbox.
local forget_us = tonumber(ARGV[1])
local now = store_time()
local m, stale = current('epoch', 'nonce')
local epoch, nonce = tonumber(m[1]), m[2]
local DONE, RETRY, OVER, OTHER = 1, 2, 3, 4
local records, kept, over_by, freed, gone = {}, {}, {}, {}, 0

local function load_records()
  local ids, names, windows = {}, {}, {}
  for i = 2, #ARGV, 5 do
    ids[#ids + 1] = ARGV[i]
  end
  for i, packed in ipairs(fetch(reservations, ids)) do
    records[ids[i]] = packed and cmsgpack.unpack(packed) or nil
    counters_of(records[ids[i]] or {}, names, windows)
  end
  read(names, windows, now)
end

local function store_records()
  write()
  in_chunks('HSET', reservations, kept)
  in_chunks('ZADD', ended, over_by)
  in_chunks('ZREM', leases, freed)
  outstanding(-gone)
  tidy(now, forget_us)
  if #kept > 0 then
    wake_first()
  end
end

local function pin(id, r)
  if r[STATE] == HELD then
    r[STATE] = PINNED
    kept[#kept + 1], kept[#kept + 2] = id, cmsgpack.pack(r)
    freed[#freed + 1] = id
  end
  return DONE
end

local function apply(id, kind, tokens, cost)
  local r = records[id]
  if not r then
    return DONE
  elseif r[STATE] > PINNED then
    local differs = kind == 'settled' and r[ATTEMPT] > 0 and (r[R_TOKENS] ~= tokens or r[R_COST] ~= cost)
    return differs and OTHER or DONE
  elseif kind == 'pin' then
    return pin(id, r)
  end
  freed[#freed + 1], gone = id, gone + 1
  if kind == 'void' then
    finish(id, r, now, VOID, 0, 0, 0, true, kept, over_by)
    return DONE
  end
  local over = tokens > r[R_TOKENS] or cost > r[R_COST]
  finish(id, r, now, SETTLED, tokens, cost, r[QUANTITY], true, kept, over_by)
  return over and OVER or DONE
end

if stale then
  forget_all()
end
if epoch then
  load_records()
end
local outcomes = {}
for i = 2, #ARGV, 5 do
  local told = tonumber(ARGV[i + 1])
  if not epoch then
    outcomes[#outcomes + 1] = nonce and RETRY or DONE
  elseif told < epoch then
    outcomes[#outcomes + 1] = DONE
  elseif told > epoch then
    forget_all()
    epoch, nonce = nil, nil
    outcomes[#outcomes + 1] = DONE
  else
    outcomes[#outcomes + 1] = apply(ARGV[i], ARGV[i + 2], tonumber(ARGV[i + 3]), tonumber(ARGV[i + 4]))
  end
end
if epoch then
  store_records()
end
return outcomes
