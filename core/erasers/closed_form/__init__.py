"""Closed-form erasure: linear maps of text vectors, computed in float64 without any training."""
