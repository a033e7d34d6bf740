-- Prolongs tickets of a tenant. ARGV: tenant, ids. Answers one number an id: 1 it has its place, 0 it has none any more.
local line, was = line_of(ARGV[1])
local answers = {}
for i = 2, #ARGV do
  local place = place_in(line, ARGV[i])
  if place then
    line[place + 2] = store_time() + TICKET_US
  end
  answers[i - 1] = place and 1 or 0
end
store_line(ARGV[1], line, was)
return answers
