"""Tiny models with random weights of every family that a host knows, made of its own classes: for tests and checks."""
