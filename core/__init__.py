"""Everything that thinks; only core.host knows the host."""
