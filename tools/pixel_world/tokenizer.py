"""Builds the demo model's tokenizer: CLIP's byte-pair encoding with a small vocabulary."""

import json
from pathlib import Path

import numpy as np
from membrane.tools.pixel_world import world
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77


def words():
    """Every word of the world's captions; each becomes a single token."""
    rng = np.random.default_rng(0)
    captions, _ = world.sample_captions(world.sample_sprites(20000, rng), rng)
    return sorted({w.strip(",") for c in (*captions, *world.MEMORISED_CAPTIONS) for w in c.split()})


def build(folder):
    """Writes vocab.json and merges.txt, the files of transformers' CLIPTokenizer."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        words(), trainers.BpeTrainer(vocab_size=5000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]
    alphabet = list(dict.fromkeys(_byte_alphabet()))
    vocab = alphabet + [c + "</w>" for c in alphabet]
    vocab += [a + b for a, b in merges if a + b not in set(vocab)]
    vocab += [BOS, EOS]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocab)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LENGTH,
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": EOS,
        "pad_token": EOS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _byte_alphabet():
    """CLIP's 256 printable stand-ins for the byte values, in CLIP's order."""
    keep = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    return [chr(c) for c in keep] + [chr(256 + i) for i in range(256 - len(keep))]


def load(folder):
    """transformers' CLIPTokenizer over the built files."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(folder))


def encode(tokenizer, captions, length=LENGTH):
    """Token ids (n, length) int64, padded with the end token, and the place of the first end token (n,)."""
    ids = tokenizer(list(captions))["input_ids"]
    end = tokenizer.eos_token_id
    rows = np.full((len(ids), length), end, np.int64)
    ends = np.empty(len(ids), np.int64)
    for row, (i, tokens) in zip(rows, enumerate(ids)):
        tokens = tokens[: length - 1] + [end] if len(tokens) > length else tokens
        row[: len(tokens)] = tokens
        ends[i] = len(tokens) - 1
    return rows, ends


def t5_rows(ids, ends, start):
    """The rows of `encode` as T5 spells them: no start token, and padding that is not the end token.

    ids (n, length) and ends (n,) from `encode`; start: the start token's id, free to serve as padding.
    Returns ids (n, length - 1) and ends (n,).
    """
    rows, ends = ids[:, 1:], ends - 1
    return np.where(np.arange(rows.shape[1]) > ends[:, None], start, rows), ends
