"""Runs the host's sampler and networks, and listens to them."""
