"""What is put on a clone of the host's MODEL."""
