"""What a run needs on hardware that is not there: memory, FLOPs, bytes, and a bound on the time."""
