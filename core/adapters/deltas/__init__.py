"""The kinds of deltas: one file a kind, with all its paths."""
