"""Prompts as a model reads them."""

from dataclasses import dataclass
from functools import cached_property

import torch

from .concepts import last_subject_token


@dataclass(frozen=True)
class Encoded:
    """Prompts as the model reads them."""

    prompts: tuple[str, ...]
    ids: tuple[list[int], ...]  # token ids of each, (T,)
    vectors: torch.Tensor  # (n, T, d), float32 on the CPU
    end: int  # id of the end token
    pooled: torch.Tensor | None = None  # (n, p), one vector a prompt, where the model reads such (SDXL)

    @cached_property
    def place(self):
        """{prompt: its index}."""
        return {prompt: i for i, prompt in enumerate(self.prompts)}

    def row(self, prompt):
        """Vectors (T, d) of one of the prompts."""
        return self.vectors[self.place[prompt]]

    def id_row(self, prompt):
        """Token ids (T,) of one of the prompts."""
        return self.ids[self.place[prompt]]

    def subject(self, prompt, word):
        """Index of the last token of the word in the prompt; the word is one of the prompts too."""
        return last_subject_token(self.id_row(prompt), self.words(word), self.end)

    def words(self, prompt):
        """Token ids of one of the prompts without start, end and padding."""
        ids = self.id_row(prompt)
        return ids[1 : ids.index(self.end, 1)]
