-- Raises what a living hold holds, under every rule whose counters it was charged to: all or nothing.
-- ARGV: version and families of the configuration, calendars, plan, id, epoch, tokens, cost (totals, not differences).
-- Answers as reserve.lua, one item, or {"lost"} | {"whose", user, feature} when the plan is another subject's.
local m = current('epoch', 'version', 'families')
local epoch = tonumber(m[1])
if not epoch or epoch ~= tonumber(ARGV[6]) then
  return { 'lost' }
end
local fits = fit(m[3], m[2], ARGV[2], ARGV[1])
if fits == 'behind' then
  return { 'behind', tonumber(m[2]) }
end
local suffixes = suffixes_of(ARGV[3])
if not suffixes then
  return { 'periods', now }
end
local id, r = ARGV[5], record(ARGV[5])
local lease = call('ZSCORE', leases, id)
if not r or r[STATE] ~= HELD or r[ATTEMPT] == 0 or not lease or tonumber(lease) <= now then
  return { 'lost' }
end
local form, subject = cmsgpack.unpack(ARGV[4])
local plan = plan_of(form, subject, suffixes)
if plan.user ~= r[USER] or plan.feature ~= r[FEATURE] then
  return { 'whose', r[USER], r[FEATURE] }
end

-- It counts where it was reserved, also when that day or month has ended meanwhile. A counter it was not charged to does not bind it, nor does a
-- window that it has left: of those only the figures are told.
local charged_names, charged_windows = {}, {}
counters_of(r, charged_names, charged_windows)
read(charged_names, charged_windows, now)
local own, binds = {}, {}
for i = 1, #r[CHARGES], 3 do
  -- Only a calendar's counter has its period at its end: elsewhere a user's name may look like one.
  local name = r[CHARGES][i]
  own[r[CHARGES][i + 2] == 0 and string.gsub(name, '@%d+$', '') or name] = name
end
for place, stem in ipairs(plan.stems) do
  local name = own[stem]
  binds[place] = name and (book[name][WINDOW] == 0 or r[RESERVED] > now - book[name][WINDOW])
  plan.counters[place] = name and book[name] or plan.counters[place]
end

local tokens, cost = math.max(tonumber(ARGV[7]), r[R_TOKENS]), math.max(tonumber(ARGV[8]), r[R_COST])
local more = { [TOKENS] = tokens - r[R_TOKENS], [COST] = cost - r[R_COST] }
local whole = { [TOKENS] = tokens, [COST] = cost }

-- By rule when it has room for what is added; nothing when every rule has.
local function in_the_way(shadow)
  local times, refused = {}, false
  for i = 1, #plan.rules, STRIDE do
    local place, unit = plan.rules[i], plan.rules[i + 1]
    local need = (plan.rules[i + 3] == 1) == shadow and (place == 0 and whole[unit] or place > 0 and binds[place] and more[unit]) or 0
    local excess = more[unit] and more[unit] > 0 and need - (plan.rules[i + 2] - used_by(plan, i)) or 0
    local time = 0
    if excess > 0 and need > 0 then
      local c = counter_of(plan, i)
      time = c and c[WINDOW] > 0 and frees_us(c, excess) or 0
      time, refused = time > 0 and time or -1, true
    end
    times[#times + 1] = time
  end
  return refused and times or nil
end

local refused = in_the_way(false)
if refused then
  return { 'ok', now, epoch, figures({ V_REFUSED, r[RESERVED], r[R_TOKENS], r[R_COST], r[OUTPUT], count_ended(now) }, plan, refused) }
end
local shaded = in_the_way(true)
if more[TOKENS] > 0 or more[COST] > 0 then
  for i = 1, #r[CHARGES], 3 do
    local unit = r[CHARGES][i + 1]
    if unit < SHADED or not shaded then
      adjust(book[r[CHARGES][i]], r[RESERVED], now, more[unit % SHADED] or 0)
    end
  end
  r[R_TOKENS], r[R_COST] = tokens, cost
  if not shaded and r[SHADOW_TOKENS] >= 0 then
    r[SHADOW_TOKENS], r[SHADOW_COST] = r[SHADOW_TOKENS] + more[TOKENS], r[SHADOW_COST] + more[COST]
  end
  write()
  call('HSET', reservations, id, cmsgpack.pack(r))
end
return { 'ok', now, epoch, figures({ V_HELD, r[RESERVED], tokens, cost, r[OUTPUT], 0 }, plan, shaded) }
