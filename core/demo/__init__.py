"""Pixel World: the toy world's networks and its exact judge."""
