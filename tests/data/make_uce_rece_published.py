"""Writes uce_rece_published.safetensors: what the published RECE and UCE code computes on small random layers.

python make_uce_rece_published.py RECE_FOLDER UCE_FOLDER, exports of the two repositories. Their functions run
unchanged; pipelines, tokenizer and text encoder are the stubs below, everything in float64.
README_closed_form.md says more.
"""

import copy
import importlib.util
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import Linear, Module, ModuleList

WIDTH, TOKENS, ROWS, START, END = 16, 9, (12, 20, 16), 100, 101
CONCEPTS, REPLACEMENTS, PRESERVED = ["star", "big heart"], ["", "disc"], ["", "small moon"]
PROMPTS = list(dict.fromkeys([*CONCEPTS, *REPLACEMENTS, *PRESERVED]))
WORDS = sorted({word for prompt in PROMPTS for word in prompt.split()})
PENALTY = 0.1


class Attention(Module):
    def __init__(self, rows):
        super().__init__()
        self.to_k, self.to_v = Linear(WIDTH, rows, bias=False), Linear(WIDTH, rows, bias=False)


class CrossBlock(Module):
    def __init__(self, rows):
        super().__init__()
        block = Module()
        block.attn2 = Attention(rows)
        holder = Module()
        holder.transformer_blocks = ModuleList([block])
        self.attentions = ModuleList([holder])


class Unet(Module):
    def __init__(self):
        super().__init__()
        down, middle, up = map(CrossBlock, ROWS)
        self.down_blocks, self.mid_block, self.up_blocks = ModuleList([down]), middle, ModuleList([up])


class Tokenizer:
    model_max_length = TOKENS

    def __call__(self, texts, **options):
        rows = [[WORDS.index(w) for w in text.split()] for text in ([texts] if isinstance(texts, str) else texts)]
        ids = torch.tensor([[START, *row] + [END] * (TOKENS - 1 - len(row)) for row in rows])
        mask = torch.tensor([[1] * (len(row) + 2) + [0] * (TOKENS - 2 - len(row)) for row in rows])
        return Tokens(input_ids=ids, attention_mask=mask)


class Tokens(dict):
    __getattr__ = dict.__getitem__


class Encoder:
    """Causal: each state is a vector of its token plus 0.6 of the state before."""

    def __init__(self):
        self.table = torch.randn(END + 1, WIDTH, generator=torch.Generator().manual_seed(1)) * 2

    def __call__(self, ids):
        states, state = [], torch.zeros(len(ids), WIDTH)
        for column in ids.T:
            state = 0.6 * state + self.table[column]
            states.append(state)
        return (torch.stack(states, 1),)


class Pipe:
    def __init__(self):
        self.device, self.tokenizer, self.text_encoder = "cpu", Tokenizer(), Encoder()
        torch.manual_seed(2)
        self.unet = Unet()

    def encode_prompt(self, prompt, **options):
        return self.text_encoder(self.tokenizer(prompt).input_ids)

    def weights(self):
        return {name: p.detach().clone() for name, p in self.unet.named_parameters()}


def load(name, file):
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def stubbed(rece, uce):
    """The modules of both repositories; what they import but do not need here is empty."""
    for name in ("diffusers", "pandas", "PIL", "PIL.Image", "tqdm", "published", "published.execs", "published.calc"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["tqdm"].tqdm = lambda items, **options: items
    sys.modules["diffusers"].StableDiffusionPipeline = sys.modules["diffusers"].DiffusionPipeline = None
    sys.modules["published.execs"].generate_images = sys.modules["published.execs"].compute_nudity_rate = None
    sys.modules["published.calc"].embedding2img = sys.modules["published.calc"].setup_seed = None
    return (
        load("published.methods.train_uce", rece / "erase_methods" / "train_uce.py"),
        load("published.methods.uce", rece / "erase_methods" / "uce.py"),
        load("published.calc.close_form_emb", rece / "utils" / "embedding_calculation" / "close_form_emb.py"),
        load("published_uce", uce / "trainscripts" / "uce_sd_erase.py"),
    )


def main(rece, uce):
    torch.set_default_dtype(torch.float64)
    start_edit, edit, derive, newer = stubbed(Path(rece), Path(uce))
    torch.set_grad_enabled(True)
    pipe = Pipe()
    found = {f"start.{k}": v for k, v in pipe.weights().items()}
    with torch.no_grad():
        found["embeddings"] = pipe.text_encoder(pipe.tokenizer(PROMPTS).input_ids)[0]
    found["ids"] = pipe.tokenizer(PROMPTS).input_ids

    original = copy.deepcopy(pipe)
    start_edit.edit_model(
        pipe, CONCEPTS, REPLACEMENTS, PRESERVED, lamb=0.5, erase_scale=1.0, preserve_scale=1.0, technique="replace"
    )
    found |= {f"uce.{k}": v for k, v in pipe.weights().items()}

    def derivations(model, kind):
        for concept, replacement in zip(CONCEPTS, REPLACEMENTS):
            if kind == "zero":
                _, vector = derive.close_form_emb_regzero(model, original, concept, regeular_scale=PENALTY)
            elif kind == "standard":
                old = replacement or " "  # '' would be taken for none given
                _, vector = derive.close_form_emb(
                    model, original, concept, old_target_concept=old, regeular_scale=PENALTY
                )
            else:
                _, vector = derive.close_form_emb(model, original, concept, regeular_scale=PENALTY, reg_item=kind)
            yield vector[0].detach()

    for kind, epochs in (("zero", 3), ("1st", 1), ("2nd", 2), ("both", 2), ("standard", 2)):
        model = copy.deepcopy(pipe)
        for epoch in range(1, epochs + 1):
            vectors = list(derivations(model, kind))
            goals = [original.text_encoder(original.tokenizer(r).input_ids)[0][0] for r in REPLACEMENTS]
            edit.edit_model_adversarial(
                model, vectors, goals, PRESERVED, lamb=0.1, erase_scale=1.0, preserve_scale=0.1, technique="replace"
            )
            found[f"rece.{kind}.{epoch}.derived"] = torch.stack(vectors)
            found |= {f"rece.{kind}.{epoch}.{k}": v for k, v in model.weights().items()}

    saved = {}
    newer.device, newer.torch_dtype = "cpu", torch.float64
    newer.save_file = lambda state, path: saved.update(state)
    torch.Tensor.float, plain = torch.Tensor.double, torch.Tensor.float  # its inverse is in float32 otherwise
    newer.UCE(original, CONCEPTS, REPLACEMENTS, PRESERVED, 1.0, 1.0, 0.5, "", "")
    torch.Tensor.float = plain
    found |= {f"last_token.{k}": v.detach().clone() for k, v in saved.items()}
    save_file(found, str(Path(__file__).parent / "uce_rece_published.safetensors"))
    print(len(found), "tensors,", sum(v.numel() for v in found.values()) * 8 // 1000, "kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
