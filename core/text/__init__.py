"""Text becomes rows: concepts and templates, prompts as an encoder gives them, and which of their rows count."""
