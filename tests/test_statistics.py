"""log_softmax and row_statistics."""

from __future__ import annotations

import pytest
import torch

import fastkd
from fastkd import reference
from tests import cases, compare


@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize("vocab", [1, 17, 1023, 1025, 5003])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_row_statistics(backend: str, family: str, vocab: int, temperature: float) -> None:
    logits, _ = cases.logits(family, 5, vocab)
    labels = cases.labels(5, vocab, ignored=(1,))
    ours = fastkd.row_statistics(logits, labels, temperature)
    exact = torch.log_softmax(logits.double() / temperature, -1)
    eager = torch.log_softmax(logits / temperature, -1)

    compare.assert_value(ours.log_sum_exp, torch.logsumexp(logits.double() / temperature, -1))
    entropies = [-(x.exp() * x).nan_to_num(0.0).sum(-1) for x in (exact, eager)]
    compare.assert_value(ours.entropy, entropies[0], entropies[1])
    assert ours.argmax.tolist() == logits.argmax(-1).tolist()
    picked = [x.gather(1, labels.clamp(min=0)[:, None])[:, 0] for x in (exact, eager)]
    assert ours.label_logprob[1].isnan()
    others = torch.tensor([0, 2, 3, 4])
    compare.assert_value(ours.label_logprob[others], picked[0][others], picked[1][others])


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_row_statistics_dtypes_shapes_and_ties(backend: str, dtype: torch.dtype) -> None:
    logits = cases.logits("far", 6, 3000, dtype)[0].view(2, 3, 3000)
    logits[..., 1500] = logits[..., 2800] = 100
    statistics = fastkd.row_statistics(logits)
    assert all(x.shape == (2, 3) for x in statistics)
    assert (statistics.argmax == 1500).all()
    assert statistics.label_logprob.isnan().all()
    exact = fastkd.row_statistics(logits.float())
    torch.testing.assert_close(statistics.entropy, exact.entropy, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rows", [0, 5, 300])
def test_row_statistics_of_a_projection(backend: str, rows: int) -> None:
    """Chunk by chunk what the logits give, for several chunks too."""
    hidden, weight, bias = torch.randn(2, rows, 8), torch.randn(150_001, 8), torch.randn(150_001)
    if backend == "reference":
        weight, bias = weight[:3001], bias[:3001]
    labels = cases.labels(2 * rows, 3001).view(2, rows)
    source = fastkd.Projection(hidden, weight, bias, softcap=4.0)
    ours = fastkd.row_statistics(source, labels, 1.5)
    for name, part, whole in zip(ours._fields, ours, fastkd.row_statistics(source.logits(), labels, 1.5), strict=True):
        assert part.shape == (2, rows)
        assert part.dtype == whole.dtype
        if name != "argmax":
            torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-5)
    picked = source.logits().gather(-1, ours.argmax[..., None])[..., 0]
    torch.testing.assert_close(picked, source.logits().amax(-1), rtol=1e-5, atol=1e-5)


def test_row_statistics_of_masked_and_broken_rows(backend: str) -> None:
    logits, _ = cases.logits("far", 3, 2100)
    logits[0, 5:2000] = -torch.inf
    logits[1, 77] = torch.nan
    statistics = fastkd.row_statistics(logits, torch.tensor([6, 0, 0]))
    assert statistics.label_logprob[0] == -torch.inf
    assert statistics.entropy[0].isfinite()
    assert statistics.entropy[1].isnan()
    assert statistics.log_sum_exp[1].isnan()
    assert statistics.entropy[2].isfinite()


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_log_softmax(backend: str, family: str, dtype: torch.dtype, temperature: float) -> None:
    if family == "offset" and dtype != torch.float32:
        pytest.skip("an offset of 1e4 leaves nothing of the logits in 8 or 11 bits")
    logits = cases.logits(family, 4, 3001, dtype)[0]
    upstream = torch.randn(4, 3001).to(dtype)
    outcomes = []
    for x, function in (
        (logits, lambda z: fastkd.log_softmax(z, temperature)),
        (logits.float(), lambda z: torch.log_softmax(z / temperature, -1)),
        (logits.double(), lambda z: torch.log_softmax(z / temperature, -1)),
    ):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        (gradient,) = torch.autograd.grad(out, leaf, upstream.to(out.dtype))
        outcomes.append((out.detach(), gradient))
    ours, eager, truth = outcomes
    assert ours[0].dtype == dtype
    compare.assert_gradient(ours[0], eager[0].to(dtype), truth[0], "log-probabilities")
    compare.assert_gradient(ours[1], eager[1].to(dtype), truth[1])


def test_log_softmax_layouts_and_masks(backend: str) -> None:
    wide = torch.randn(3, 4, 700)
    wide[..., 9] = -torch.inf
    view = wide[:, :2, :650].requires_grad_()
    out = fastkd.log_softmax(view, 2.0)
    torch.testing.assert_close(out, torch.log_softmax(view / 2, -1))
    upstream = torch.randn(650, 3, 2).permute(1, 2, 0)  # last dimension strided
    (gradient,) = torch.autograd.grad(out, view, upstream, retain_graph=True)
    (expected,) = torch.autograd.grad(torch.log_softmax(view / 2, -1), view, upstream)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(out.sum(), view, create_graph=True)


def test_log_softmax_gradcheck() -> None:
    fastkd.use_backend("reference")
    leaf = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: fastkd.log_softmax(z, 1.7), leaf)


def test_normaliser_is_shared_between_backends() -> None:
    """A forward on one backend may meet a backward on another: the saved normaliser means the same."""
    from fastkd.kernels import cpu

    logits, upstream = cases.logits("offset", 3, 1200)
    outs = [torch.empty_like(logits) for _ in range(2)]
    normalisers = [b.log_softmax(logits, 2.0, out) for b, out in zip((cpu, reference), outs, strict=True)]
    grads = []
    for backend, normaliser in ((cpu, normalisers[1]), (reference, normalisers[0])):
        grads.append(torch.empty_like(logits))
        backend.log_softmax_backward(upstream, logits, normaliser, 2.0, grads[-1])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-3 * upstream.abs().max().item())
