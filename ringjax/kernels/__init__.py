"""Block kernels: attention of one query shard to one block. They see tiles, positions and segments, no axis names."""
