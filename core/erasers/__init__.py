"""What makes erasure adapters: closed forms, training, pruning, extraction from edited weights."""
