"""Whether a device keeps the fp32 results of 16-bit products is asked once, and only a refusal is taken for one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastkd.projection import products

DEVICE = torch.device("cpu")  # which refuses them: a GPU without them does the same


@pytest.fixture(autouse=True)
def nothing_asked_yet() -> Iterator[None]:
    products._fp32_results.cache_clear()
    yield
    products._fp32_results.cache_clear()


def test_a_refusal_is_told_once_and_says_what_it_costs() -> None:
    with pytest.warns(RuntimeWarning, match=r"bfloat16 products on cpu, so they are computed in fp32"):
        assert not products._fp32_results(DEVICE, torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not products._fp32_results(DEVICE, torch.bfloat16)


def test_an_older_torch_without_the_argument_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def older(a: Any, b: Any, *, out: Any) -> None: ...

    monkeypatch.setattr(torch, "mm", older)
    with pytest.warns(RuntimeWarning, match="TypeError"):
        assert not products._fp32_results(DEVICE, torch.float16)


@pytest.mark.parametrize("failure", products._FAILURES)
def test_a_device_that_fails_has_refused_nothing(failure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any, **settings: Any) -> None:
        raise failure("out of memory, or an earlier kernel failed")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "mm", failing)
        with pytest.raises(failure):
            products._fp32_results(DEVICE, torch.bfloat16)
    monkeypatch.setattr(torch, "mm", lambda *a, **k: None)
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: None)
    assert products._fp32_results(DEVICE, torch.bfloat16)


def test_any_other_error_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any, **settings: Any) -> None:
        raise KeyError("a fault of ours")

    monkeypatch.setattr(torch, "mm", failing)
    with pytest.raises(KeyError):
        products._fp32_results(DEVICE, torch.bfloat16)
