"""On-disk formats: one file each, recognised by their keys."""
