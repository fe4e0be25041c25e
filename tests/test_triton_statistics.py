"""Row statistics, log-softmax and the scaling of gradients in Triton, interpreted on CPU tensors."""

from __future__ import annotations

import pytest
import torch

from fastkd.kernels import gpu
from tests import cases, compare
from tests.triton_interpreter import interpreted


@pytest.mark.parametrize("vocab", [1, 9, 2050])
@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_statistics_and_log_softmax(family: str, vocab: int, temperature: float) -> None:
    logits, upstream = cases.logits(family, 3, vocab)[0], torch.randn(3, vocab)
    labels = cases.labels(3, vocab, ignored=(1,))
    with interpreted() as trace:
        log_sum_exp, entropy, argmax, picked, told = gpu.row_statistics(logits, labels, temperature)
    # Once, the labels' columns, and what may hold a row's maximum: at most a step of 128 threads, and the edges.
    again = trace.loads(logits).sum() - logits.numel() - 2
    assert 0 < again <= 3 * (128 * 2 * 4 + 6)
    exact = torch.log_softmax(logits.double() / temperature, -1)
    eager = torch.log_softmax(logits / temperature, -1)
    compare.assert_value(log_sum_exp, torch.logsumexp(logits.double() / temperature, -1))
    entropies = [-(x.exp() * x).nan_to_num(0.0).sum(-1) for x in (exact, eager)]
    compare.assert_value(entropy, entropies[0], entropies[1])
    assert argmax.tolist() == logits.argmax(-1).tolist()
    assert picked[1].isnan()
    for i in (0, 2):
        compare.assert_value(picked[i], exact[i, labels[i]], eager[i, labels[i]])

    out, grad = torch.empty_like(logits), torch.empty_like(logits)
    with interpreted():
        normaliser = gpu.log_softmax(logits, temperature, out)
        gpu.log_softmax_backward(upstream, logits, normaliser, temperature, grad)
    assert normaliser.shape == (3, 2)  # as the operator's fake says
    torch.testing.assert_close(told, normaliser)
    compare.assert_gradient(out, eager, exact, "log-probabilities")
    q, above = exact.exp(), upstream.double()
    truth = (above - q * above.sum(-1, keepdim=True)) / temperature
    slope = (upstream - eager.exp() * upstream.sum(-1, keepdim=True)) / temperature
    compare.assert_gradient(grad, slope, truth)
    own = slice(vocab // 3, vocab)  # some of a row's columns, as ranks have them
    with interpreted():
        part, total = grad[:, own].clone(), upstream.sum(-1)
        gpu.log_softmax_backward(upstream[:, own], logits[:, own], normaliser, temperature, part, total)
    compare.assert_gradient(part, slope[:, own], truth[:, own])


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_argmax_is_the_first_of_equals(shift: int) -> None:
    """Wherever they are: in the edges before and behind the vectors, in one step or two, in one thread or two."""
    vocab, step = 2055, 128 * 2 * 4
    memory = torch.zeros(shift + 9 * vocab)
    logits = memory[shift:].view(9, vocab)
    ties = [(0, 2054), (2054,), (1, step + 1), (2053, 2054), (7, 5), (step + 9, 9), (1500, 2054), (0, 1), ()]
    for row, columns in zip(logits, ties, strict=True):
        row[list(columns)] = 1.0
    with interpreted():
        found = gpu.row_statistics(logits, None, 1.0)[2]
    assert found.tolist() == [min(columns, default=0) for columns in ties]
    logits[:] = -torch.inf
    with interpreted():
        assert (gpu.row_statistics(logits, None, 1.0)[2] == 0).all()


@pytest.mark.parametrize("count", [3, 4096, 4099, 4112, 5997])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_scale(dtype: torch.dtype, count: int) -> None:
    """In place by a scalar on the device, whole vectors and what is left; by 1 without touching the gradient."""
    original = torch.randn(1, count).to(dtype)
    for factor, touched in ((0.3, 1), (1.0, 0)):
        grad = original.clone()
        with interpreted() as trace:
            assert gpu.scale_(grad, torch.tensor(factor)) is grad
        assert torch.equal(grad, (original.float() * factor).to(dtype))
        assert trace.loads(grad).unique().tolist() == trace.stores(grad).unique().tolist() == [touched]
    strided = original.clone()[:, ::2]
    assert torch.equal(gpu.scale_(strided, torch.tensor(2.0)), original[:, ::2] * 2)
