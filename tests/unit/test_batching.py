"""Prompts of one batch: what a conditioning carries beside its text stays with its row."""

import torch
from membrane.core.host.runs import batching
from membrane.core.host.runs.batching import batches, fitting, join


def conditioning(length=6, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, length, 8, generator=generator), {"pooled_output": None, **options}]]


def masked(words, length=6, seed=0):
    """As Qwen-Image's and Z-Image's encoders give it: a mask over the tokens beside the vectors."""
    mask = (torch.arange(length) < words).long()[None]
    return conditioning(length, seed, attention_mask=mask)


def test_each_row_keeps_its_own_mask():
    texts = [masked(words, seed=words) for words in (2, 5, 3)]
    assert fitting(texts) == [[0, 1, 2]]
    ((vectors, options),) = join(texts)
    assert torch.equal(vectors, torch.cat([text[0][0] for text in texts]))
    assert options["attention_mask"].sum(dim=1).tolist() == [2, 5, 3]
    assert options["pooled_output"] is None


def test_every_tensor_is_joined_row_by_row_and_equal_values_stay():
    pooled, llama = torch.randn(2, 1, 4), torch.randn(2, 1, 3, 6, 8)
    texts = [
        conditioning(seed=i, pooled_output=pooled[i], conditioning_llama3=llama[i], guidance=3.5) for i in range(2)
    ]
    before = [dict(text[0][1]) for text in texts]
    assert fitting(texts) == [[0, 1]]
    options = join(texts)[0][1]
    assert torch.equal(options["pooled_output"], pooled[:, 0]) and torch.equal(
        options["conditioning_llama3"], llama[:, 0]
    )
    assert options["guidance"] == 3.5
    assert [text[0][1].keys() for text in texts] == [options.keys() for options in before]  # those that came stay


def test_what_does_not_fit_is_not_in_one_batch():
    mask = masked(3)
    shared = object()
    for other in (
        conditioning(),  # no mask
        masked(3, length=7),  # another length
        conditioning(attention_mask=torch.ones(1, 3)),  # a mask of another shape
        conditioning(attention_mask=None),
        conditioning(attention_mask=torch.ones(6)),  # no row of its own
        [*masked(4), *masked(5)],  # two parts
    ):
        assert fitting([mask, other, masked(2)]) == [[0, 2], [1]]
    assert fitting([conditioning(guidance=3.5), conditioning(guidance=4.0)]) == [[0], [1]]
    assert fitting([conditioning(hooks=shared), conditioning(hooks=shared)]) == [[0, 1]]
    assert fitting([conditioning(hooks=[1]), conditioning(hooks=[1])]) == [[0], [1]]
    loose = [conditioning(attention_mask=torch.ones(6)) for _ in range(2)]
    assert fitting(loose) == [[0], [1]]


def test_one_conditioning_for_all_rows_stays_itself():
    text = [*masked(4), *masked(5)]
    assert join([text, text]) is text and fitting([text, text]) == [[0], [1]]


def test_batches_are_of_one_kind_and_hold_each_prompt_with_each_seed():
    texts = [masked(2), conditioning(), masked(4), masked(5)]
    found = batches(texts, [7, 8], 4, "euler")
    assert sorted(pair for rows in found for pair in rows) == [(i, seed) for i in range(4) for seed in (7, 8)]
    assert max(map(len, found)) == 4
    assert [{i for i, _ in rows} for rows in found] == [{0, 2}, {3}, {1}]
    assert "euler_ancestral" not in batching.BATCHED
    assert all(len(rows) == 1 for rows in batches(texts, [7, 8], 4, "euler_ancestral"))
