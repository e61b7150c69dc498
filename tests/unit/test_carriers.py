"""Which rows carry a concept where an encoder spreads a word over others, and what the methods make of them."""

import zlib

import pytest
import torch
from membrane.core.erasers.closed_form.groups import NEEDED, PUBLISHED, carrying, spreads
from membrane.core.erasers.closed_form.job import Job, solve
from membrane.core.families.family import ALL, CONTEXT, LATER, TextEntry
from membrane.core.text.carriers import carriers, evened, fixed, kept, parts, scale
from membrane.core.text.concepts import Concept
from membrane.core.text.encoded import END, PADDING, START, TEMPLATE, WORD, Encoded, EncodedPrompt

ROLE = {"S": START, "w": WORD, "e": END, ".": PADDING, "T": TEMPLATE}
WORDS = {word: i for i, word in enumerate("a red star big five pointed circle on snow photo of house".split(), 10)}
D = 48


def prompt(text, roles, size=1.0):
    """An EncodedPrompt; a row's vector is told by its place, its word and all words before it, as in a language model.

    roles: a letter a row; words stand at "w".
    """
    words, ids, rows, seen = iter(text.split()), [], [], ""
    for place, role in enumerate(roles):
        word = next(words) if role == "w" else role
        ids.append(WORDS.get(word, -1) if role == "w" else {"S": 1, "e": 2, ".": 0, "T": 5}[role])
        seen += f" {word}"
        g = torch.Generator().manual_seed(zlib.crc32(f"{seen} {place}".encode()))
        rows.append(torch.randn(D, generator=g) * size)
    head = next((i for i, role in enumerate(roles) if role != "T"), 0) if text else roles.count("T") - 1
    return EncodedPrompt(text, torch.stack(rows), tuple(ids), torch.tensor([ROLE[r] for r in roles]), head=max(0, head))


def places(pair, target, replacement):
    """[(row of the target, row of the replacement)] of a Pair."""
    return [
        tuple(int((p.rows == row).all(dim=1).nonzero()[0]) for p, row in zip((target, replacement), rows))
        for rows in zip(pair.targets, pair.replacements)
    ]


def test_a_language_model_spreads_a_word_over_what_follows():
    old, new = prompt("a red star on snow", "TTwwwwwTT"), prompt("a red circle on snow", "TTwwwwwTT")
    found = places(carriers(old, new, LATER, False), old, new)
    assert found == [(i, i) for i in range(4, 9)]


def test_t5_spreads_a_word_over_the_whole_prompt():
    old, new = prompt("a red star on snow", "wwwwwe..."), prompt("a red circle on snow", "wwwwwe...")
    assert places(carriers(old, new, ALL, False), old, new) == [(i, i) for i in range(6)]
    assert places(carriers(old, new, ALL, True), old, new) == [(i, i) for i in range(9)]


def test_rows_behind_are_aligned_from_the_end():
    """Three tokens for one: the last ones belong together, the others go to the first of the replacement."""
    old, new = prompt("a five pointed star on snow", "Twwwwwwe"), prompt("a circle on snow", "Twwwwe")
    found = places(carriers(old, new, LATER, False), old, new)
    assert found == [(2, 2), (3, 2), (4, 2), (5, 3), (6, 4), (7, 5)]
    back = places(carriers(new, old, LATER, False), new, old)
    assert back == [(2, 4), (3, 5), (4, 6), (5, 7)]


def test_an_empty_replacement_takes_the_row_before_its_place():
    old, new = prompt("a photo of star", "wwwwe"), prompt("a photo of", "wwwe")
    assert places(carriers(old, new, LATER, False), old, new) == [(3, 2), (4, 3)]
    bare, nothing = prompt("star", "we"), prompt("", "e")
    assert places(carriers(bare, nothing, ALL, False), bare, nothing) == [(0, 0), (1, 0)]


def test_encoders_side_by_side_are_aligned_each():
    """CLIP's context, then T5's rows, of different length."""
    old, new = (
        prompt("star on snow star on snow", "Swwwe..wwwe."),
        prompt("circle on snow circle on snow", "Swwwe..wwwe."),
    )
    assert [len(part) for part in parts(old)] == [5, 4]
    assert parts(prompt("", "Se....e.....")) == [[0, 1], [6]]
    found = places(carriers(old, new, ALL, False), old, new)
    assert found == [(i, i) for i in (0, 1, 2, 3, 4, 7, 8, 9, 10)]


def test_what_stays_and_what_no_map_may_change():
    found = prompt("a house", "TTTwwTT..")
    assert torch.equal(fixed(found, LATER), found.rows[:3]) and len(fixed(found, ALL)) == 0
    assert torch.equal(kept(found, LATER, False), found.rows[3:7])
    assert torch.equal(kept(found, LATER, True), found.rows[3:])
    assert torch.equal(kept(found, ALL, False), found.rows[:7])
    assert evened(found.rows).square().sum() == pytest.approx(float(found.rows.square().sum()) / 9, rel=1e-6)


def test_rows_get_the_length_of_clips():
    rows = [torch.randn(n, D, generator=torch.Generator().manual_seed(n)) * 300 for n in (3, 50)]
    factor = scale(rows)
    assert torch.cat(rows).mul(factor).square().sum(dim=1).mean() == pytest.approx(768, rel=1e-5)
    assert scale([torch.zeros(2, D)]) == 1.0


# ---------------------------------------------------------------- the methods on them


def encoded(job, reach, size=1.0, pads=False):
    """What a job reads, behind a template for a language model."""
    head, tail = ("TT", "T") if reach == LATER else ("", "e..")
    each = [prompt(text, head + "w" * len(text.split()) + tail, size) for text in job.prompts()]
    return Encoded(each, entry=TextEntry("text", "cross_attn", "c_crossattn", reach=reach, pads=pads))


def star(method="UCE", rows=NEEDED, **settings):
    return Job.of([Concept("star", "circle")], (), ("{}", "a red {} on snow"), method, rows=rows, **settings)


@pytest.mark.parametrize("reach", [LATER, ALL])
def test_uce_is_the_formula_on_the_rows_that_carry(reach):
    """Gandikota et al. 2024, eq. 7, naively in float64: rows of CLIP's length, each prompt counting once, nothing on
    the rows of the template."""
    texts = encoded(star(), reach)
    found = solve(star(), texts).matrix().double()
    head = 2 if reach == LATER else 0
    stays = {t: texts[t] for t in ("", "circle", "a red circle on snow")}
    blocks = {t: p.rows[head:][p.roles[head:] != PADDING].double() for t, p in stays.items()}
    pairs = [("star", "circle"), ("a red star on snow", "a red circle on snow")]
    cut = {"star": head, "a red star on snow": head + 2} if reach == LATER else dict.fromkeys(dict(pairs), 0)
    targets = [
        (texts[a].rows[cut[a] :], texts[b].rows[cut[a] :], texts[a].roles[cut[a] :] != PADDING) for a, b in pairs
    ]
    targets = [(a[there].double(), b[there].double()) for a, b, there in targets]
    lengths = torch.cat([*blocks.values(), *(a for a, _ in targets)]).square().sum(dim=1)
    size = (768 / lengths.mean()).sqrt()
    c, n = (torch.cat([pair[k] * size * len(pair[0]) ** -0.5 for pair in targets]) for k in (0, 1))
    r = torch.cat([block * size * len(block) ** -0.5 for block in blocks.values()])
    p = torch.eye(D, dtype=torch.float64)
    if head:
        q = torch.linalg.qr(texts[""].rows[:head].double().T)[0]
        p = p - q @ q.T
    outside_c, outside_r = c @ p, r @ p
    system = outside_c.T @ outside_c + outside_r.T @ outside_r + 0.5 * torch.eye(D, dtype=torch.float64)
    expected = (n - c).T @ outside_c @ torch.linalg.inv(system)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    if head:
        assert (texts[""].rows[:head].double() @ found.T).norm() < 1e-5 * found.norm() * size


@pytest.mark.parametrize("method", ["UCE", "SPEED", "Double Projections"])
@pytest.mark.parametrize("size", [0.02, 300.0])
def test_settings_mean_the_same_at_every_length(method, size):
    settings = {"SPEED": {"tau": 5.0}, "Double Projections": {"tau": 5.0}}.get(method, {})
    plan = star(method, **settings)
    one, other = (solve(plan, encoded(plan, LATER, s)).matrix().double() for s in (1.0, size))
    assert one.norm() > 0.01 and (one - other).norm() < 1e-4 * one.norm()


def test_as_published_takes_the_rows_of_clips_rule():
    texts = encoded(star(), ALL)
    assert spreads(star(), texts) and not spreads(star(rows=PUBLISHED), texts)
    assert not spreads(star(), encoded(star(), CONTEXT))
    needed, published = (solve(star(rows=rows), texts).matrix() for rows in (NEEDED, PUBLISHED))
    assert (needed - published).norm() > 0.05 * needed.norm()


def test_a_replacement_stays_unless_it_is_erased_too():
    assert len(carrying(star(), encoded(star(), LATER)).replacing) == 2
    both = Job.of([Concept("star", "circle"), Concept("circle", "star")], (), ("{}",), "UCE")
    assert carrying(both, encoded(both, LATER)).replacing == []


@pytest.mark.parametrize("times", [2, 5])
def test_speed_erases_as_much_where_a_caption_has_more_rows(times):
    """Rows that only repeat a caption's row change nothing: rho is a weight beside captions, not beside rows."""
    plan = Job.of([Concept("star", "circle")], (), ("{}",), "SPEED", tau=100.0, rho=300.0)
    once = {text: prompt(text, "w" * len(text.split())) for text in plan.prompts() if text}
    entry = TextEntry("text", "cross_attn", "c_crossattn", reach=ALL)
    empty = EncodedPrompt("", torch.ones(1, D), (2,), torch.tensor([END]))
    found = []
    for count in (1, times):
        rows = {
            text: EncodedPrompt(text, p.rows.repeat(count, 1), p.ids * count, p.roles.repeat(count))
            for text, p in once.items()
        }
        found.append(solve(plan, Encoded([empty, *rows.values()], entry=entry)).matrix().double())
    assert found[0].norm() > 0.01 and (found[0] - found[1]).norm() < 0.02 * found[0].norm()
