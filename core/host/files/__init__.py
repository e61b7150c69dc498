"""Files in the host's folders."""
