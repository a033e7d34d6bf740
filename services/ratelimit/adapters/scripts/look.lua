-- Tells what is used and whether a call of this size would be admitted. Writes nothing.
-- ARGV: tokens, cost, window, five limits. Answers: {"rebuild"} | {"refused" | "held", now, epoch, 0, expired holds, figures…}
local epoch = current_epoch()
if not epoch then
  return { 'rebuild' }
end
local tokens, cost, window_us = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local limits = five_limits(4)
local now = store_time()
local u = usage(now, window_us)
local verdict = refused(u, limits, tokens, cost) and 'refused' or 'held'
return { verdict, now, tonumber(epoch), 0, call('ZCOUNT', leases, '-inf', integer(now)), figures(u, limits, tokens, window_us) }
