-- Applies what the ledger says of calls. ARGV: window, forget, then five an item: id, epoch, kind (settled | void | pin), tokens, cost.
-- Answers one number an item: 1 done, 2 send again, 3 done and more was used than held.
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
local window_us, forget_us = tonumber(ARGV[1]), tonumber(ARGV[2])
local now = store_time()
local m, stale = current('epoch', 'nonce')
local epoch, nonce = tonumber(m[1]), m[2]
local DONE, RETRY, OVER = 1, 2, 3

local function apply(id, kind, tokens, cost)
  local r = record(id)
  if not r or (r.state ~= 'held' and r.state ~= 'pinned') then
    return DONE
  end
  if kind == 'pin' then
    if r.state == 'held' then
      pin(id, r)
    end
    return DONE
  elseif kind == 'void' then
    finish(id, r, now, 'void', 0, 0, true)
    return DONE
  end
  local over = tokens > r.tokens or cost > r.cost
  finish(id, r, now, 'settled', tokens, cost, true)
  return over and OVER or DONE
end

if stale then
  forget_all()
end
local outcomes = {}
for i = 3, #ARGV, 5 do
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
  tidy(now, window_us, forget_us)
end
return outcomes
