"""Reads the host's MODEL: its layers, the names they have, its effective weights. Changes nothing."""
