"""Planning: the memory, FLOPs, bytes and time of a run on devices that need not exist."""
