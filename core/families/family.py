"""What is said of a kind of model: records without behaviour, so that a new kind is one file of data."""

import re
from dataclasses import dataclass

from ..errors import ErasureError

OTHER = "other"  # role of a layer that no pattern fits
ALL, FIRST, LAST = "all", "first", "last"  # where the text's rows stand in a layer

# how far a word spreads over the rows of a prompt: over its context as CLIP's published methods have it; over all rows
# behind it (causal language models); over all rows (bidirectional encoders such as T5)
CONTEXT, LATER = "context", "later"
REACHES = (CONTEXT, LATER, ALL)


@dataclass(frozen=True)
class TextEntry:
    """One place where text enters a network: a tensor of the conditioning, and the layers that read it first.

    name: of the entry, in files and adapters. argument: what the host's `extra_conds` gets it as, such as
    "cross_attn"; result: what `extra_conds` gives it back as, such as "c_crossattn". readers: patterns of the names of
    the linear layers that read it first; none where other rows are mixed in or the width varies, then only the
    conditioning can be mapped. norm: what stands before the readers, for people, "" where nothing does; a map is exact
    on the conditioning only then, else on the input of the readers. prepared: layers of the model run inside
    `extra_conds`, and the map acts on what it gives. pooled: one row a prompt instead of one a token, which fills the
    first inputs of its reader. layer: which of several texts along the second dimension, None where there is one.
    width: name of the setting of the host's model configuration that says how wide the vectors are, "" where the
    readers alone say it. encoder: whose rows they are, "" where any may be; maps of another encoder are refused.
    stream: the tokens the rows belong to, in the host's name of the encoder, "" where their number tells. reach: one
    of REACHES. pads: whether the network attends to padding. asked: whether a map of it is made only when it is asked
    for.
    """

    name: str
    argument: str
    result: str
    readers: tuple[str, ...] = ()
    norm: str = ""
    pooled: bool = False
    width: str = ""
    prepared: bool = False
    layer: int | None = None
    encoder: str = ""
    stream: str = ""
    reach: str = CONTEXT
    pads: bool = False
    asked: bool = False

    def reads(self, name):
        """Whether the layer of this name, a dotted path in the network, reads the entry first."""
        return any(re.search(pattern, name) for pattern in self.readers)

    @property
    def direct(self):
        """Whether the layers read the encoder's rows as they are."""
        return not self.norm and not self.prepared

    def mapped(self, tensor, change):
        """The entry's tensor of a conditioning with change(rows (n, T, d)) in place of its rows; a copy."""
        if self.pooled:
            return change(tensor[:, None])[:, 0]
        if self.layer is None:
            return change(tensor)
        changed = tensor.clone()
        changed[:, self.layer] = change(tensor[:, self.layer])
        return changed

    def texts(self, tensor):
        """The entry's rows (n, T, d) of all prompts in its tensor of a conditioning."""
        if self.pooled:
            return tensor[:, None]
        return tensor if self.layer is None else tensor[:, self.layer]

    def rows(self, tensor):
        """The entry's rows (T, d) of the first prompt in its tensor of a conditioning."""
        own = tensor[0] if self.layer is None else tensor[0, self.layer]
        return own[None] if self.pooled else own


@dataclass(frozen=True)
class TextRows:
    """Which rows are the text's in layers that text and picture may share.

    layers: pattern of their sites in the host's names, searched for. place: "all", the layers see the text alone;
    "first" or "last", its rows stand before or after the picture's. How many they are is told from what the network is
    called with: the rows (next to last dimension) of its tensors, each rounded up to a multiple, and those that the
    network adds of itself. tensors: (name of a tensor or a list of them, attribute of the network that reads it,
    without which these rows are not there; "" for one that is always read). pictures: name of a list of reference
    pictures, each of which has `multiple` rows of padding in the text's place where the last of `tensors`, a list, has
    no text for it. splits: name of a list that, where it is not empty, puts pictures between the text's rows, so that
    the call is refused. moved: whether older hosts put the rows behind the picture.
    """

    layers: str
    place: str
    tensors: tuple[tuple[str, str], ...] = ()
    multiple: int = 1
    added: int = 0
    pictures: str = ""
    splits: str = ""
    moved: bool = False

    def count(self, call):
        """Number of the text's rows for {name: tensor or list of tensors} that the network is called with."""
        texts = [self._lengths(call.get(name)) for name, _ in self.tensors]
        missing = len(call.get(self.pictures) or ()) - len(texts[-1]) if self.pictures else 0
        rounded = sum(-(-length // self.multiple) for of_tensor in texts for length in of_tensor)
        return self.added + (rounded + max(0, missing)) * self.multiple

    @staticmethod
    def _lengths(found):
        if found is None:
            return []
        return [text.shape[-2] for text in (found if isinstance(found, (list, tuple)) else [found])]


@dataclass(frozen=True)
class Family:
    """A kind of model. Everything that differs between kinds is asked of this record.

    name: for files and messages; title: for people. configs: names of the host's model configurations that are of this
    kind; one that a configuration is derived from counts too. marks: modules of the network that tell it from others
    of the same configuration. entries: where text enters, the main one first; none for a model whose text cannot be
    mapped. roles: (pattern of a site, role), the first that is found counts. trained: pattern of the sites that
    training adapts when no role is named. text_width: of the main entry's vectors, to tell families apart in messages,
    0 where it varies. architectures: what LoRA files call it, (start of the host's name, kohya's
    ss_base_model_version, modelspec.architecture), the first that fits. refused: why text cannot be erased from it, or
    "". note: what a user should know when its text is erased, or "". cache: the host's transformer option of what it
    keeps of the text between steps and samplings, in families where it does; a map inside the network needs it off.
    joint: where the text's rows stand in layers that see more than the text, for changes that act on them alone; the
    first whose pattern fits a site counts, and a site that none fits has no such rows.
    """

    name: str
    title: str
    configs: tuple[str, ...]
    entries: tuple[TextEntry, ...]
    roles: tuple[tuple[str, str], ...] = ()
    trained: str = ""
    text_width: int = 0
    architectures: tuple[tuple[str, str, str], ...] = ()
    refused: str = ""
    marks: tuple[str, ...] = ()
    note: str = ""
    cache: str = ""
    joint: tuple[TextRows, ...] = ()

    @property
    def text(self):
        """The main entry; raises ErasureError for a family without one."""
        if not self.entries:
            raise ErasureError(
                f"The text of {self.title} models cannot be erased: {self.refused}; use an adapter on layers."
            )
        return self.entries[0]

    def text_rows(self, site):
        """TextRows of the layer at a site in the host's names, None where nothing is known of its rows."""
        return next((rows for rows in self.joint if re.search(rows.layers, site)), None)

    def role(self, site):
        """What the layer at a site does, such as "cross_attention.key", or "other"."""
        return next((role for pattern, role in self.roles if re.search(pattern, site)), OTHER)
