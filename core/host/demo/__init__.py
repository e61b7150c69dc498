"""The demo model as objects of the host."""
