"""Token shards, sample order, and batches: the data path. It knows ranks only as integers."""
