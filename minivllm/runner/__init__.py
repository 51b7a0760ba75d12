"""One device's work: rows, batches, weights, cache tensors. It computes what a plan says and decides nothing."""
