"""What services share."""

import os

# The process's sockets are read by the thread that waits for their events. With gRPC's default engine one thread polls, another reads
# and a third hands over: an empty call then costs a third more. Read once, when grpc is loaded, which imports of this package precede.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
