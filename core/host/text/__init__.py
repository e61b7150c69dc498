"""Text through the host's encoders: prompts as rows, and which words a conditioning was made from."""
