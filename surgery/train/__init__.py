"""Training for the methods that need it: data, batches, one loop, and what of a run survives a kill."""
