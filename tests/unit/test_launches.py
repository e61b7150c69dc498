"""What is counted of a step: kernels, copies and waits, each of which a few lines make on purpose."""

import pytest
import torch
from membrane.tools.launches import META, Launches

NUMBERS = torch.arange(3)


def meta(*shape):
    return torch.zeros(*shape, device=META)


@pytest.mark.parametrize(
    "made",
    [
        lambda x: x[:, [0, 2]],
        lambda x: x[:, range(2)],
        lambda x: x.__setitem__((slice(None), [1]), 0.0),
        lambda x: NUMBERS.to(META),
        lambda x: torch.tensor([1.0, 2.0], device=META),
        lambda x: x[:, NUMBERS],
    ],
)
def test_copies(made):
    x = meta(4, 3)
    with Launches() as counted, torch.no_grad():
        made(x)
    assert counted.totals()["copies"] == 1 and not counted.waits


@pytest.mark.parametrize(
    "made",
    [
        lambda x: x[0, 0].item(),
        lambda x: float(x.sum()),
        lambda x: bool((x == x[:1]).all()),
        lambda x: x.cpu(),
        lambda x: x.__setitem__(x > 0, 1.0),
        lambda x: x.to("cpu", torch.float64),
    ],
)
def test_waits(made):
    x = meta(4, 3)
    with Launches() as counted, torch.no_grad():
        made(x)
    assert counted.totals()["waits"] == 1 and not counted.copies


def test_kernels():
    x, places = meta(4, 3), torch.zeros(2, dtype=torch.long, device=META)
    with Launches() as counted, torch.no_grad():
        y = torch.nn.functional.linear(x.view(2, 2, 3), meta(5, 3))  # a matmul, and the zeros of its weight
        y[:, :, 0].mul_(2.0)
        x[:, places]
        x.T.detach()
        torch.ones(3) * NUMBERS  # on the processor
    assert counted.kernels == {"zeros": 1, "mm": 1, "mul_": 1, "index": 1}
    assert counted.totals() == {"kernels": 4, "copies": 0, "waits": 0}
