-- Closes the guard, and forgets how often it was open. Answers 1 when it was open.
local open = (tonumber(call('HGET', guard, 'until_us')) or 0) > store_time()
call('DEL', guard)
return open and 1 or 0
