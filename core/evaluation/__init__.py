"""What an erasure does and what it damages."""
