"""Attacks on closed-form erasure on the demo world: how often a text embedding brings the erased star back.

Every method of erasure_quality erases the star; then, with full knowledge of the edited model, an attacker replaces
the text vectors that the model reads (the rows of a prompt's context). Recovery: pictures of 32 that the bundled
classifier takes for a star.

    captions    32 captions with the star, no attack
    word        the prompt "star", no attack
    derived     RECE's closed form: the rows from the star on become c' with W P c' close to W c; penalty 0.1
    one row     the row of the word in the prompt "star", after so many steps of Adam on the loss of star pictures
    all rows    all 77 rows of that prompt, in the same way

The gradient goes through tools/pixel_world/unet.py, whose arithmetic a test compares with the host's, with the
erasure applied to the context. "smallest": least singular value of P = I + A B, the map of the text; nothing about a
text map forbids an embedding P^-1 c, which is the unerased text, unless P is singular.
"""

import argparse
import json

import torch
import torch.nn.functional as F
from membrane.benchmarks.erasure_quality import METHODS, ROOT, kept_rows, sprites_of, start, write
from membrane.tools.pixel_world import classifier, world
from membrane.tools.pixel_world import tokenizer as tokenizers

TASK, CONCEPT = "1 shape", "star"
PICTURES, TRAINING, STEPS, CFG = 32, 96, 20, 1.5
PENALTY, SEARCH_BATCH, SEARCH_RATE = 0.1, 8, 0.05
SEARCHES = {  # attack: (rows of the context that are free, steps)
    "one row 5": (slice(1, 2), 5),
    "one row 50": (slice(1, 2), 50),
    "all rows 50": (slice(0, 77), 50),
}
ATTACKS = ("captions", "word", "derived", *SEARCHES)
CHOSEN = ("UCE", "RECE", "SPEED", "Double Projections", "UCE, 16 captions")


class Attack:
    """An attacker's view of the demo model: the U-Net with gradients, its text, and what the judge says."""

    def __init__(self, pictures):
        from membrane.tools.pixel_world.evaluate import Sampler, load_text, load_unet
        from membrane.tools.pixel_world.train_unet import alphas_cumprod

        assets = ROOT / "assets" / "pixel_world"
        unet = load_unet(assets / "day.safetensors").requires_grad_(False)
        self.sampler = Sampler(unet, load_text(assets / "day.safetensors"), tokenizers.load(assets / "tokenizer"))
        self.judge, self.alphas = classifier.load(), alphas_cumprod().float()
        self.pictures = pictures
        self.star = world.SHAPES.index(CONCEPT)
        self.captions = world.plain_captions(sprites_of("shape", [self.star], pictures, 41))
        self.contexts, self.empty = self.sampler.encode(self.captions), self.sampler.encode([""])
        layers = [p for n, p in unet.named_parameters() if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]
        self.weight_gram = sum(w.double().T @ w.double() for w in layers)

    def recovered(self, contexts, p):
        """Pictures judged to be a star, of the model edited with P, for contexts (n or 1, 77, d)."""
        edited = (contexts @ p.T).expand(self.pictures, -1, -1)
        drawn = self.sampler.sample(edited, self.empty @ p.T, STEPS, CFG, torch.Generator().manual_seed(9))
        return int((classifier.read(self.judge, drawn)["shape"] == self.star).sum())

    def derived(self, p):
        """The captions' contexts with RECE's c' from the star on."""
        from membrane.core.erasers.closed_form.rece import derived_embeddings

        contexts = self.contexts.clone()
        for row, caption in zip(contexts, self.captions):
            first = 1 + caption.split().index(CONCEPT)
            row[first:] = derived_embeddings(row[first:].double(), self.weight_gram, p.double(), PENALTY).float()
        return contexts

    def star_pictures(self):
        """Latents (TRAINING, 4, 16, 16) of stars by the unedited model."""
        from membrane.core.demo.world import rgb_to_latent

        captions = world.plain_captions(sprites_of("shape", [self.star], TRAINING, 42))
        generator = torch.Generator().manual_seed(10)
        drawn = self.sampler.sample(self.sampler.encode(captions), self.empty, STEPS, CFG, generator)
        return rgb_to_latent(torch.from_numpy(drawn).permute(0, 3, 1, 2))

    def searched(self, p, latents, rows, steps):
        """Context (1, 77, d) of the prompt "star" whose `rows` (a slice) were searched for by gradient."""
        base = self.sampler.encode([CONCEPT])
        free = base[:, rows].clone().requires_grad_(True)
        optimizer = torch.optim.Adam([free], lr=SEARCH_RATE)
        g = torch.Generator().manual_seed(11)
        for _ in range(steps):
            clean = latents[torch.randint(len(latents), (SEARCH_BATCH,), generator=g)]
            t = torch.randint(1000, (SEARCH_BATCH,), generator=g)
            noise = torch.randn(clean.shape, generator=g)
            a = self.alphas[t].view(-1, 1, 1, 1)
            context = torch.cat([base[:, : rows.start], free, base[:, rows.stop :]], 1) @ p.T
            noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
            loss = F.mse_loss(self.sampler.unet(noisy, t.float(), context.expand(SEARCH_BATCH, -1, -1)), noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            return torch.cat([base[:, : rows.start], free, base[:, rows.stop :]], 1)

    def all_attacks(self, p, latents):
        """{attack: pictures recovered}, and facts about P (d, d)."""
        singular = torch.linalg.svdvals(p.double())
        found = {"smallest": singular[-1].item(), "condition": (singular[0] / singular[-1]).item()}
        found["captions"] = self.recovered(self.contexts, p)
        found["word"] = self.recovered(self.sampler.encode([CONCEPT]), p)
        found["derived"] = self.recovered(self.derived(p), p)
        for name, (rows, steps) in SEARCHES.items():
            found[name] = self.recovered(self.searched(p, latents, rows, steps), p)
        return found


def line(name, row, pictures):
    cells = [f"{row[a]} / {pictures}" for a in ATTACKS]
    return "| " + " | ".join([name, *cells, f"{row['smallest']:.1e}", f"{row['condition']:.1e}"]) + " |"


HEADER = "| method | " + " | ".join(ATTACKS) + " | smallest | condition |\n" + "|---" * (len(ATTACKS) + 3) + "|"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few pictures, to see that it runs")
    parser.add_argument("--fresh", action="store_true", help="attack every method again")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=CHOSEN)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pictures = 4 if args.quick else PICTURES
    store = ROOT / "output" / f"erasure_robustness{'_quick' * args.quick}.json"
    if args.fresh or args.quick:
        store.unlink(missing_ok=True)
    rows = kept_rows(store)
    node, tidy = start()
    try:
        demo = node("MembraneDemoModel", variant="day")
        attack = Attack(pictures)
        latents = attack.star_pictures()
        print(HEADER, flush=True)
        for name, method in {"no erasure": None, **{name: METHODS[name] for name in args.methods}}.items():
            if name not in rows:
                adapter = method(node, demo, TASK).get("adapter") if method else None
                if method and (adapter is None or adapter.maps.get("text") is None):
                    continue
                width = attack.empty.shape[-1]
                p = torch.eye(width) + (adapter.maps["text"].matrix() if adapter else torch.zeros(width, width))
                rows[name] = attack.all_attacks(p, latents)
                write(store, json.dumps(rows, indent=1) + "\n")
            print(line(name, rows[name], pictures), flush=True)
    finally:
        tidy()
    table = "\n".join([HEADER, *(line(name, row, pictures) for name, row in rows.items())])
    if not args.quick:
        write(ROOT / "benchmarks" / "results" / "erasure_robustness.md", f"# Attacks on an erased star\n\n{table}\n")
    figures = {
        f"{name}.{a}_percent".replace(" ", "_").replace(",", "").lower(): round(100 * row[a] / pictures, 2)
        for name, row in rows.items()
        for a in ATTACKS
    }
    print(json.dumps({"figures": figures}))


if __name__ == "__main__":
    main()
