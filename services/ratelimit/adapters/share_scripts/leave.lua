-- Takes tickets of a tenant out of its line; who has come to its front by it is woken. ARGV: tenant, ids. Answers 1.
local line, was = line_of(ARGV[1])
for i = 2, #ARGV do
  tear_ticket(line, ARGV[i])
end
store_line(ARGV[1], line, was)
return 1
