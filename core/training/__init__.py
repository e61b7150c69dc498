"""Training of erasure adapters."""
