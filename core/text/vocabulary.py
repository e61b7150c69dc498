"""From the pieces of a tokenizer's vocabulary to text: how CLIP, SentencePiece, byte-level BPE and BERT write them."""

import re
from functools import cached_property

MARK = "\0"
END_OF_WORD, SPACE, BYTE_SPACE, WITHIN = "</w>", "\u2581", "\u0120", "##"
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPECIAL = re.compile(r"<\|[^|<>]*\|>|</?\w+>|\[/?[A-Z_]+\]")


def _byte_alphabet():
    """{character: byte} of byte-level BPE: printable bytes stand for themselves, all others are moved behind 255
    (Radford et al. 2019, section 2.2)."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(moved)}


BYTES = _byte_alphabet()


class Vocabulary:
    """Pieces {id: str} of a tokenizer.

    kind: what marks the beginning or the end of a word in them: "</w>" behind a word (CLIP), U+2581 before it
    (SentencePiece), U+0120 for a space among bytes (byte-level BPE), "##" within a word (BERT); "" for none.
    """

    def __init__(self, pieces):
        self.pieces = pieces

    @cached_property
    def kind(self):
        counts = {
            END_OF_WORD: sum(piece.endswith(END_OF_WORD) for piece in self.pieces.values()),
            SPACE: sum(piece.startswith(SPACE) for piece in self.pieces.values()),
            BYTE_SPACE: sum(piece.startswith(BYTE_SPACE) for piece in self.pieces.values()),
            WITHIN: sum(piece.startswith(WITHIN) for piece in self.pieces.values()),
        }
        best = max(counts, key=counts.get)
        return best if counts[best] else ""

    def text(self, ids, marks=False):
        """The text that token ids stand for. Special tokens, and what is no piece of the vocabulary, part words;
        marks: with the names of special tokens between two MARKs."""
        raw = b"".join(self._bytes(self.pieces.get(i, ""), marks) for i in ids)
        return raw.decode("utf-8", errors="replace")

    def _bytes(self, piece, marks):
        """UTF-8 of a piece, with spaces where it says that a word begins or ends."""
        byte = BYTE.fullmatch(piece) if self.kind == SPACE else None
        if byte:
            return bytes([int(byte[1], 16)])
        if not piece or SPECIAL.fullmatch(piece):
            return f"{MARK}{piece}{MARK}".encode() if marks else b" \n "
        if self.kind == END_OF_WORD:
            own, ending = piece.removesuffix(END_OF_WORD), piece.endswith(END_OF_WORD)
            return _of_alphabet(own) + (b" " if ending else b"")
        if self.kind == BYTE_SPACE:
            return _of_alphabet(piece)
        if self.kind == SPACE:
            return piece.replace(SPACE, " ").encode()
        if self.kind == WITHIN:
            return piece[len(WITHIN) :].encode() if piece.startswith(WITHIN) else b" " + piece.encode()
        return piece.encode()

    @cached_property
    def words(self):
        """{id: word} of the pieces that are a whole word by themselves, behind another word where that is told."""
        found = {}
        for i, piece in self.pieces.items():
            if self._whole(piece) and not SPECIAL.fullmatch(piece):
                found[i] = self.text([i]).strip()
        return found

    def _whole(self, piece):
        if self.kind == END_OF_WORD:
            return piece.endswith(END_OF_WORD)
        if self.kind == WITHIN:
            return not piece.startswith(WITHIN)
        return piece.startswith(self.kind)


def _of_alphabet(piece):
    return b"".join(bytes([BYTES[c]]) if c in BYTES else c.encode() for c in piece)
