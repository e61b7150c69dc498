"""What judges an erasure: what is gone, what is damaged, what is memorised, what brings it back."""
