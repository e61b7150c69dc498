"""Erasure adapters: the kinds of deltas, their gates, stacks of them, and the plan of what a model gets."""
