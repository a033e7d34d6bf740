"""The rpcs: proto in, one call on the store, proto out."""
