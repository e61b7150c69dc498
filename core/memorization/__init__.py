"""Memorised pictures: finding them without the training data, and where they are kept."""
