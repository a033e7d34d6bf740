-- Takes the counters away, as a loss of data would; what another has asked the ledger for stays asked, and a tombstone stands.
if call('HEXISTS', meta, 'epoch') == 1 then
  forget_all()
end
return 1
