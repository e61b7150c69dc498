"""The arithmetic of the mitigations alone, against attention written naively and lengths made up."""

import torch
from membrane.core.erasers.mitigation import (
    LEAVE,
    PADDING,
    START,
    Transition,
    pull,
    reweighted_attention,
    switched,
    token_codes,
)


def test_each_picture_of_a_batch_has_its_own_transition():
    """The rule alone, on lengths made up for three pictures: opened where they first grow, on the way down only."""
    run = Transition(torch.zeros(3))
    told = []
    for sigma, lengths in [
        (9.0, (5.0, 5.0, 5.0)), (7.0, (4.0, 6.0, 4.0)), (8.0, (9.0, 9.0, 9.0)),  # back up: a restart
        (7.0, (4.0, 6.0, 4.0)), (5.0, (4.5, 1.0, 3.0)), (5.0, (3.9, 1.0, 3.5)), (3.0, (3.0, 1.0, 3.6)),
    ]:  # fmt: skip
        run.see(torch.full((3,), sigma), torch.tensor(lengths))
        told.append(run.open.tolist())
    assert told == [
        [False, False, False], [False, True, False], [False, True, False], [False, True, False], [True, True, False],
        [True, True, False], [True, True, True],
    ]  # fmt: skip


def test_the_other_scale_counts_for_the_pictures_that_wait():
    usual, on, off = (torch.full((2, 1, 2, 2), value) for value in (9.0, 5.0, 1.0))
    found = switched(usual, on, off, torch.tensor([True, False]), -2.0, 1.0)
    assert (found[0] == 1 - 2 * 4).all() and (found[1] == 9).all()
    assert (switched(usual, on, off, torch.tensor([True, False]), -2.0, 0.5)[0] == 1.0).all()
    assert torch.equal(pull(on, off, torch.tensor([1.0, 4.0])), torch.tensor([8.0, 2.0]))


def test_codes_of_a_text_of_several_contexts():
    assert token_codes([(5, 2), (3, 2)]).tolist() == [START, LEAVE, LEAVE, PADDING, PADDING, START, LEAVE, LEAVE]


def naive_attention(q, k, v, heads, codes, factor):
    """(rows, n, heads d) float64, a loop over rows, heads and queries."""
    out = torch.zeros_like(q, dtype=torch.float64)
    width = q.shape[-1] // heads
    for row in range(len(q)):
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            for i in range(q.shape[1]):
                logits = [
                    float(q[row, i, part].double() @ k[row, j, part].double()) / width**0.5 for j in range(k.shape[1])
                ]
                logits = [x * factor if codes[row][j] == START else x for j, x in enumerate(logits)]
                weights = torch.tensor(
                    [0.0 if codes[row][j] == PADDING else torch.tensor(x).double().exp() for j, x in enumerate(logits)]
                ).double()
                out[row, i, part] = (weights / weights.sum()) @ v[row, :, part].double()
    return out


def test_attention_is_that_of_the_formula():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 8, generator=g) for n in (3, 6, 6))
    codes = [[START, LEAVE, LEAVE, PADDING, PADDING, LEAVE], [LEAVE] * 6]
    known = torch.tensor(codes)[:, :5]  # the sixth token was appended by someone else
    found = reweighted_attention(q, k, v, 2, known, 1.25, 1.0)
    assert torch.allclose(found.double(), naive_attention(q, k, v, 2, codes, 1.25), atol=1e-5)
    halfway = reweighted_attention(q, k, v, 2, known, 1.5, 0.5)
    assert not torch.allclose(halfway, found, atol=1e-3)
    assert torch.allclose(halfway[1], found[1], atol=1e-6)
