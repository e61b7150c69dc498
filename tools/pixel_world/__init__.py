"""What made the demo model: the world it depicts, its training and its measuring."""
