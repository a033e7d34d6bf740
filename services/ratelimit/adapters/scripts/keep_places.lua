-- Prolongs the leases of tickets. ARGV: ids. Answers one number an id: 1 it has its place, 0 it has none any more.
-- Tickets of processes that died go, and who has come to the front by it is woken.
local answers = {}
for i, id in ipairs(ARGV) do
  local t = ticket_of(id)
  if t then
    keep_ticket(t)
  end
  answers[i] = t and 1 or 0
end
write_line()
return answers
