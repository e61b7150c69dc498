"""Closed-form erasure against the published cost structures: time, exactness and memory.

Side by side in one run with straightforward implementations of what the published code computes; random weights and
CLIP-like embeddings of real shapes, text encoding left out on both sides. RECE is timed as a whole: Gram matrix of
all key and value matrices, UCE and 3 epochs in float64 here; 3 times one epoch in float32, without its UCE, there.
"""

import argparse
import ctypes
import gc
import json
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from membrane.core.erasers.closed_form.double_projection import double_projection_of
from membrane.core.erasers.closed_form.job import METHODS, Job, solve
from membrane.core.erasers.closed_form.layers import LayerGram
from membrane.core.erasers.closed_form.rece import rece_of, rece_terms
from membrane.core.erasers.closed_form.solver import gram, text_map
from membrane.core.erasers.closed_form.speed import speed_of
from membrane.core.erasers.closed_form.uce import uce_of, uce_solver, uce_terms
from membrane.core.text.concepts import Concept
from membrane.core.text.encoded import Encoded

LINUX = sys.platform == "linux"
if LINUX:
    libc = ctypes.CDLL("libc.so.6")
TOKENS, START, END, WORDS = 77, 100, 101, 1000
EPOCHS, PENALTY = 3, 0.1


@dataclass(frozen=True)
class Size:
    """What is measured: output rows of the key and value matrices, text widths, how many of what."""

    rows: tuple[int, ...] = (320,) * 10 + (640,) * 10 + (1280,) * 12  # Stable Diffusion 1.5
    width: int = 768
    wide_rows: tuple[int, ...] = (640,) * 20 + (1280,) * 120  # SDXL
    wide: int = 2048
    concepts: int = 100
    preserved: int = 1000
    repeats: int = 3
    # width of the text and outputs of the layer that reads it, of encoders of whole sentences: Flux.1, Flux.2, Krea 2
    texts: tuple[tuple[int, int], ...] = ((4096, 3072), (15360, 6144), (30720, 6144))
    text_concepts: int = 5  # of 64 rows each
    text_preserved: int = 26  # of 77 rows each


QUICK = Size(
    rows=(32, 64, 96), width=96, wide_rows=(64, 96), wide=128, concepts=8, preserved=40, repeats=1,
    texts=((768, 96), (1024, 128)), text_concepts=2, text_preserved=3,
)  # fmt: skip


# ---------------------------------------------------------------- data


def embeddings(count, width, seed):
    """(count, TOKENS, width) float32: a common mean, one shared start token, a spectrum over two decades."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(width, generator=torch.Generator().manual_seed(8)) * 0.5
    spread = torch.logspace(0.8, -1.2, width)
    rows = torch.empty(count, TOKENS, width)
    for row in rows:
        torch.randn(row.shape, generator=g, out=row)
        row.mul_(spread).add_(common)
    rows[:, 0] = common * 2
    return rows


def weights(rows, width):
    """The key and value matrices (out, width), float32, one by one, with a spectrum over one and a half decades."""
    g = torch.Generator().manual_seed(3)
    axes = torch.linalg.qr(torch.randn(width, width, generator=g))[0]
    spectrum = 0.05 * torch.logspace(0, -1.5, width)
    for out in rows:
        yield torch.randn(out, width, generator=g) * spectrum @ axes


def encoded_prompts(concepts, preserved, width):
    """Encoded: the empty prompt, then concepts c0, c1, ..., then preserved prompts p0, p1, ...; one token each."""
    prompts = ("", *(f"c{i}" for i in range(concepts)), *(f"p{i}" for i in range(preserved)))
    ids = tuple([START, *([WORDS + i] if i else []), *([END] * (TOKENS - 1 - bool(i)))] for i in range(len(prompts)))
    return Encoded.of_contexts(prompts, ids, embeddings(len(prompts), width, 1), END)


def job(method, concepts, preserved, **settings):
    words = tuple(Concept(f"c{i}", "") for i in range(concepts))
    return Job.of(words, tuple(f"p{i}" for i in range(preserved)), method=method, **settings)


# ---------------------------------------------------------------- the published cost structures


def published_edit(layers, targets, replacements, preserved, anchor, erase_scale, preserve_scale):
    """One edit of all layers as the published code does it. targets, replacements, preserved: lists of (T, d)."""
    edited = []
    eye = torch.eye(layers[0].shape[1])
    triples = [(t, r, erase_scale) for t, r in zip(targets, replacements)]
    triples += [(r, r, preserve_scale) for r in preserved]
    for index, w in enumerate(layers):
        numerator, denominator = anchor * w, anchor * eye
        for source, goal, scale in triples:
            values = [v @ goal.T for v in layers][index]  # those of all layers, of which one is used
            outer = torch.bmm(values.T[:, :, None], source[:, None, :])
            square = torch.bmm(source[:, :, None], source[:, None, :])
            numerator = numerator + scale * outer.sum(0)
            denominator = denominator + scale * square.sum(0)
        edited.append(numerator @ torch.linalg.inv(denominator))
    return edited


def published_rece_epoch(layers, start, targets, replacements, preserved):
    """One epoch of RECE as published: derived embeddings concept by concept, then an edit."""
    derived = []
    for rows in targets:
        a = PENALTY * torch.eye(rows.shape[1])
        b = torch.zeros_like(a)
        for w, v in zip(layers, start):
            a = a + w.T @ w
            b = b + w.T @ v
        derived.append((torch.linalg.inv(a) @ b @ rows.T).T)
    return published_edit(layers, derived, replacements, preserved, 0.1, 1.0, 0.1)


def published_speed(layers, targets, anchors, retained, fixed, tau=0.1, rho=1.0, draws=10):
    """SPEED as published, layer by layer: two filters, augmentation along an SVD of W, an SVD of the second moment."""
    n, eye = len(targets), torch.eye(targets.shape[1])
    t, a = targets.T @ targets / n, anchors.T @ targets / n
    edited = []
    for w in layers:
        change = w @ (a - t) @ torch.linalg.inv(eye + t)
        scores = (retained @ change.T).norm(dim=1)
        kept = retained[scores > scores.mean()]
        weakest = torch.linalg.svd(w, full_matrices=True)[2][-1]
        noise = torch.randn(draws * len(kept), len(eye)) @ weakest[:, None] * weakest
        more = kept.repeat(draws, 1) + noise
        scores = (more @ change.T).norm(dim=1)
        kept = torch.cat([kept, more[scores > scores.mean()]])
        u, sigma, _ = torch.linalg.svd(kept.T @ kept / len(kept))
        p = u[:, sigma < tau] @ u[:, sigma < tau].T
        m = torch.linalg.inv(t @ p + rho * eye)
        q = eye - m @ fixed.T @ torch.linalg.pinv(fixed @ p @ m @ fixed.T) @ fixed @ p
        edited.append(w + w @ (a - t) @ p @ q @ m)
    return edited


# ---------------------------------------------------------------- measuring


def seconds(function, repeats=1):
    """Median duration of calls, in seconds."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return median(times)


class Malloc(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def memory():
    """(bytes handed out by the allocator, resident bytes) of this process (Linux with glibc)."""
    mallinfo = libc.mallinfo2
    mallinfo.restype = Malloc
    found = mallinfo()
    return found.uordblks + found.hblkhd, int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak_memory(function):
    """The two by which memory() exceeded that before the call, sampled every 2 ms.

    The resident size counts free holes between what is in use too, so it depends on what ran before in the process;
    what was kept for reuse is given back first.
    """
    gc.collect()
    libc.malloc_trim(0)
    before, peak, done = memory(), [0, 0], threading.Event()

    def look():
        peak[:] = [max(p, now - b) for p, now, b in zip(peak, memory(), before)]

    def watch():
        while not done.wait(0.002):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
        look()
    finally:
        done.set()
        watcher.join()
    return peak


def row(name, *cells):
    print(f"{name:44}" + "".join(f"{c:>14}" for c in cells), flush=True)


def rece_speedups(size, layers, figures):
    """RECE for one and for five concepts, whole against whole."""
    row("RECE, 3 epochs", "published s", "here s", "Gram cached s", "times")
    for concepts in (1, 5):
        encoded = encoded_prompts(concepts, 0, size.width)
        task = job("RECE", concepts, 0, epochs=EPOCHS, penalty=PENALTY)
        stored = gram(layers)
        solve(task, encoded, stored)
        ours = seconds(lambda t=task, e=encoded: solve(t, e, gram(layers)), 3 * size.repeats)
        cached = seconds(lambda t=task, e=encoded, s=stored: solve(t, e, s), 3 * size.repeats)
        targets = list(encoded.vectors[1:])
        blanks = [encoded[""].rows] * concepts
        epoch = seconds(lambda t=targets, b=blanks: published_rece_epoch(layers, layers, t, b, b))
        figures[f"rece_{concepts}_speedup"] = round(EPOCHS * epoch / ours, 1)
        cells = (EPOCHS * epoch, ours, cached, EPOCHS * epoch / ours)
        row(f"  {concepts} concept(s)", *(f"{c:.2f}" for c in cells))


def many_concepts(size, figures):
    """All methods with many concepts and preserved prompts; time, and memory on the narrower width."""
    key_value_bytes = sum(size.rows) * size.width * 4
    for name, width in (("concepts_100_seconds", size.width), ("sdxl_concepts_100_seconds", size.wide)):
        encoded = encoded_prompts(size.concepts, size.preserved, width)
        g = torch.Generator().manual_seed(4)
        stored = gram(torch.randn(4 * width, width, generator=g) * 0.05)
        row(
            f"{size.concepts} concepts, {size.preserved} preserved, width {width}",
            "seconds",
            "terms",
            "peak / K+V",
            "resident",
        )
        worst, shares = 0.0, [0.0, 0.0]
        for method in METHODS:
            task = job(method, size.concepts, size.preserved)
            found = solve(task, encoded, stored)
            terms = len(found.concept)
            assert found.a.isfinite().all() and found.b.isfinite().all()
            del found
            took = seconds(lambda t=task, e=encoded, s=stored: solve(t, e, s), size.repeats)
            worst = max(worst, took)
            cells = [f"{took:.2f}", terms]
            if width == size.width and LINUX:
                kept = []
                used = peak_memory(lambda t=task, e=encoded, s=stored, k=kept: k.append(solve(t, e, s)))
                found = [u / key_value_bytes for u in used]
                shares = [max(pair) for pair in zip(shares, found)]
                cells += [f"{f:.2f}" for f in found]
            row(f"  {method}", *cells)
        figures[name] = round(worst, 2)
        if shares[0]:
            figures["peak_over_kv"], figures["peak_resident_over_kv"] = (round(s, 2) for s in shares)


def speed_speedup(size, layers, figures):
    """SPEED with many concepts on the value matrices, whole against whole."""
    encoded = encoded_prompts(size.concepts, size.preserved, size.width)
    task = job("SPEED", size.concepts, size.preserved)
    ours = seconds(lambda: solve(task, encoded), size.repeats)
    subject = encoded.vectors[:, 1]
    targets, retained = subject[1 : size.concepts + 1], subject[size.concepts + 1 :]
    empty = encoded[""].rows
    fixed = torch.cat([empty[:1], empty[1:4]])
    anchors = empty[:1].expand_as(targets)
    theirs = seconds(lambda: published_speed(layers[::2], targets, anchors, retained, fixed))
    figures["speed_100_speedup"] = round(theirs / ours, 1)
    row("SPEED, value matrices", "published s", "here s", "", "times")
    row(f"  {size.concepts} concepts", f"{theirs:.2f}", f"{ours:.3f}", "", f"{theirs / ours:.1f}")


def naive_edit(layers, targets, replacements, preserve_gram, anchor, preserve_scale):
    """UCE eq. 7 layer by layer in float64."""
    fixed = anchor * torch.eye(targets.shape[1], dtype=torch.float64) + preserve_scale * preserve_gram
    inverse = torch.linalg.inv(fixed + targets.T @ targets)
    return [(w @ fixed + (w @ replacements.T) @ targets) @ inverse for w in layers]


def exactness(size, layers, figures):
    """Largest relative error of the weight change over all matrices, against the naive edit of every layer."""
    start = [w.double() for w in layers]
    weight_gram = sum(gram(w) for w in start)
    row("relative error of the weight change", "factors", "stored float32")
    worst = 0.0
    for concepts, epochs in ((1, EPOCHS), (5, EPOCHS), (size.concepts, 1)):
        rows = embeddings(concepts + 1, size.width, 2).double()
        blank, targets = rows[0], rows[1:]
        base = gram(blank)
        groups = [[(c[1:], blank[:-1])] for c in targets]
        full = [[(c, blank)] for c in targets]
        cut, all_rows = targets[:, 1:].flatten(0, 1), targets.flatten(0, 1)
        current = naive_edit(start, cut, blank[:-1].repeat(concepts, 1), base, 0.5, 1.0)
        for epoch in range(epochs + 1):
            if epoch:
                a = PENALTY * torch.eye(size.width, dtype=torch.float64) + sum(w.T @ w for w in current)
                derived = (torch.linalg.inv(a) @ sum(w.T @ v for w, v in zip(current, start)) @ all_rows.T).T
                current = naive_edit(current, derived, blank.repeat(concepts, 1), base, 0.1, 0.1)
                terms = rece_terms(groups, full, base, weight_gram, epochs=epoch, penalty=PENALTY)
            else:
                terms = uce_terms(groups, uce_solver(groups, base))
            terms = list(terms)
            found = text_map(terms, [len(b) for _, b in terms], size.width)
            errors = []
            for change in (sum(a @ b for a, b in terms), found.a.double() @ found.b.double()):
                errors.append(
                    max(((w @ change - (v - w)).norm() / (v - w).norm()).item() for w, v in zip(start, current))
                )
            worst = max(worst, errors[0])
            label = f"RECE, {epoch} epoch(s)" if epoch else "UCE"
            row(f"  {concepts} concept(s), {label}", *(f"{e:.1e}" for e in errors))
    figures["max_relative_error"] = float(f"{worst:.2g}")


def wide_exactness(size, figures):
    """The same for all matrices of SDXL, UCE and one epoch of RECE for one concept; one matrix at a time."""
    blank, target = embeddings(2, size.wide, 2).double()
    base = gram(blank)
    eye = torch.eye(size.wide, dtype=torch.float64)

    def start():
        return (w.double() for w in weights(size.wide_rows, size.wide))

    def after_uce(w):
        return naive_edit([w], target[1:], blank[:-1], base, 0.5, 1.0)[0]

    a, mixed, weight_gram = PENALTY * eye, torch.zeros_like(eye), torch.zeros_like(eye)
    for w in start():
        v = after_uce(w)
        a.addmm_(v.T, v)
        mixed.addmm_(v.T, w)
        weight_gram.addmm_(w.T, w)
    derived = (torch.linalg.inv(a) @ mixed @ target.T).T
    groups, full = [[(target[1:], blank[:-1])]], [[(target, blank)]]
    uce = sum(a @ b for a, b in uce_terms(groups, uce_solver(groups, base)))
    rece = sum(a @ b for a, b in rece_terms(groups, full, base, weight_gram, penalty=PENALTY))
    errors = {"UCE": 0.0, "RECE, 1 epoch(s)": 0.0}
    for w in start():
        v = after_uce(w)
        both = (uce, v), (rece, naive_edit([v], derived, blank, base, 0.1, 0.1)[0])
        for name, (change, edited) in zip(errors, both):
            errors[name] = max(errors[name], ((w @ change - (edited - w)).norm() / (edited - w).norm()).item())
    row(f"{len(size.wide_rows)} matrices of width {size.wide}", "error")
    for name, error in errors.items():
        row(f"  1 concept(s), {name}", f"{error:.1e}")
    figures["sdxl_max_relative_error"] = float(f"{max(errors.values()):.2g}")


def text_rows(size, width):
    """(groups by concept, preserved rows (F, width), rows of the empty prompt) of an encoder of whole sentences."""
    rows = embeddings(2 * size.text_concepts + size.text_preserved + 1, width, 2)
    pairs = rows[: 2 * size.text_concepts, 1:65].split(size.text_concepts)
    preserved = rows[2 * size.text_concepts : -1].flatten(0, 1)
    return [[pair] for pair in zip(*pairs)], preserved, rows[-1]


def wide_text(size, figures):
    """All methods in the space of the rows: fewer rows than the text is wide, no (d, d) matrix; UCE beside one."""
    row("wide text", "rows", "seconds", "processor s", "peak GB", "terms")
    for width, outputs in size.texts:
        groups, preserved, empty = text_rows(size, width)
        row(f"  width {width}, {outputs} outputs")
        layers = LayerGram([torch.randn(outputs, width) / width**0.5])
        methods = {
            "UCE": lambda g=groups, p=preserved: uce_of(g, p),
            "SPEED": lambda g=groups, p=preserved, e=empty: speed_of(g, p, e),
            "SPEED, all preserved": lambda g=groups, p=preserved, e=empty: speed_of(g, p, e, prior_filter=False),
            "Double Projections": lambda g=groups, p=preserved: double_projection_of(
                g, p, safe=torch.cat([p, *(n for pairs in g for _, n in pairs)])
            ),
            "RECE": lambda g=groups, p=preserved, w=layers: rece_of(g, g, p, w),
        }
        rows, peak = sum(len(t) for pairs in groups for t, _ in pairs) + len(preserved), 0
        for name, method in methods.items():
            key = name.replace(",", "").replace(" ", "_").lower()
            used, begin, found = [], time.process_time(), []
            took = seconds(lambda m=method, f=found, u=used: _watched(m, f, u))
            spent = time.process_time() - begin
            assert found[0].a.isfinite().all() and found[0].b.isfinite().all()
            memory = f"{used[0][0] / 1e9:.2f}" if used else "-"
            row(f"    {name}", rows, f"{took:.2f}", f"{spent:.1f}", memory, len(found[0].concept))
            figures[f"wide_{width}_{key}_seconds"] = round(took, 2)
            figures[f"wide_{width}_{key}_processor_seconds"] = round(spent, 1)
            peak = max(peak, used[0][0] if used else 0)
        if peak:
            figures[f"wide_{width}_peak_gb"] = round(peak / 1e9, 2)
        if width == size.texts[0][0]:
            whole = seconds(lambda g=groups, p=preserved: whole_matrix(g, p), size.repeats)
            ours = seconds(lambda g=groups, p=preserved: uce_of(g, p), size.repeats)
            figures["wide_row_space_speedup"] = round(whole / ours, 1)
            row(
                f"  width {width}, UCE, (d, d) against rows",
                f"{whole:.2f}",
                f"{ours:.2f}",
                "times",
                f"{whole / ours:.1f}",
            )


def _watched(method, found, used):
    """Calls it; the result to `found`, and to `used` its peak memory where that can be seen."""
    if LINUX:
        used.append(peak_memory(lambda: found.append(method())))
    else:
        found.append(method())


def whole_matrix(groups, preserved):
    """UCE with the (d, d) matrix of eq. 7."""
    terms = list(uce_terms(groups, uce_solver(groups, gram(preserved))))
    return text_map(terms, [len(b) for _, b in terms], preserved.shape[1])


def clip_text(size, figures):
    """Everything about the text that Stable Diffusion 1.5 and XL read."""
    layers = list(weights(size.rows, size.width))
    many_concepts(size, figures)
    speed_speedup(size, layers, figures)
    exactness(size, layers, figures)
    rece_speedups(size, layers, figures)
    del layers
    wide_exactness(size, figures)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--wide", action="store_true", help="only the wide text of encoders of whole sentences")
    told = parser.parse_args()
    size = QUICK if told.quick else Size()
    torch.set_num_threads(2)
    figures = {}
    with torch.no_grad():
        if not told.wide:
            clip_text(size, figures)
        wide_text(size, figures)
    print(json.dumps({"figures": figures}))


if __name__ == "__main__":
    main()
