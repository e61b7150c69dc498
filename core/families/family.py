"""What is said of a kind of model: records without behaviour, so that a new kind is one file of data."""

import re
from dataclasses import dataclass

from ..errors import ErasureError

CONTEXTS, WORDS = SIMILARITIES = ("contexts", "words")


@dataclass(frozen=True)
class TextEntry:
    """One place where text enters a network: a tensor of the conditioning, and the layers that read it first.

    name: of the entry, in files and adapters. argument: what the host's `extra_conds` gets it as, such as
    "cross_attn"; result: what `extra_conds` gives it back as, such as "c_crossattn". readers: endings of the names of
    the linear layers that read it first. norm: ending of the name of the norm that stands before them, "" where
    nothing does; a map is exact on the conditioning only then, else on the input of the readers. pooled: one row a
    prompt instead of one a token, which fills the first inputs of its reader. width: name of the setting of the
    host's model configuration that says how wide the vectors are, "" where the readers alone say it.
    """

    name: str
    argument: str
    result: str
    readers: tuple[str, ...]
    norm: str = ""
    pooled: bool = False
    width: str = ""

    def reads(self, name):
        """Whether the layer of this name, a dotted path in the network, reads the entry first."""
        return name.endswith(self.readers)


@dataclass(frozen=True)
class EncoderRows:
    """What a family's text encoder makes of a prompt.

    causal: a token's row knows what stands before it only, so a concept smears to later rows; otherwise to all.
    batches: prompts may travel as the chunks of one long prompt and come back each as it is alone (CLIP).
    start: the first row is a start token, the same for every prompt. similarity: how gates compare two texts, one of
    SIMILARITIES: "contexts", the cosine of the flattened contexts (SPM, as published), which needs rows of one number
    for all prompts; "words", the shared words and the closest rows, for rows of any number.
    """

    causal: bool = True
    batches: bool = False
    start: bool = False
    similarity: str = WORDS


CLIP_ROWS = EncoderRows(causal=True, batches=True, start=True, similarity=CONTEXTS)


@dataclass(frozen=True)
class Family:
    """A kind of model. Everything that differs between kinds is asked of this record.

    name: for files and messages; title: for people. configs: names of the host's model configurations that are of this
    kind; one that a configuration is derived from counts too. entries: where text enters, the main one first; none
    for a model whose text cannot be mapped. rows: of its text encoder. roles: (pattern of a site, role), the first
    that is found counts. trained: pattern of the sites that training adapts when no role is named. text_width: of the
    main entry's vectors, to tell families apart in messages, 0 where it varies. architectures: what LoRA files call
    it, (start of the host's name, kohya's ss_base_model_version, modelspec.architecture), the first that fits.
    refused: why text cannot be erased from it, or "".
    """

    name: str
    title: str
    configs: tuple[str, ...]
    entries: tuple[TextEntry, ...]
    rows: EncoderRows = EncoderRows()
    roles: tuple[tuple[str, str], ...] = ()
    trained: str = ""
    text_width: int = 0
    architectures: tuple[tuple[str, str, str], ...] = ()
    refused: str = ""

    def entry(self, name):
        """The entry of that name, or None."""
        return next((entry for entry in self.entries if entry.name == name), None)

    @property
    def text(self):
        """The main entry; raises ErasureError for a family without one."""
        if not self.entries:
            raise ErasureError(
                f"The text of {self.title} models cannot be erased: {self.refused}; use an adapter on layers."
            )
        return self.entries[0]

    def role(self, site):
        """What the layer at a site does, such as "cross_attention.key", or "other"."""
        return next((role for pattern, role in self.roles if re.search(pattern, site)), OTHER)


OTHER = "other"
