"""Shared fixtures. Two threads unless a test asks for others: what CI has, and enough to find a race."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fastkd
from fastkd import backend as backend_module
from fastkd.projection.plan import _LEAST_CHUNK


@pytest.fixture(autouse=True)
def _restore_globals() -> Iterator[None]:
    threads, forced = torch.get_num_threads(), list(backend_module._process_wide)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    backend_module._process_wide.clear()
    backend_module._process_wide.extend(forced)


@pytest.fixture
def few_tokens_stand_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of as few tokens as are tested here would be too slow to be planned."""
    for kind in _LEAST_CHUNK:
        monkeypatch.setitem(_LEAST_CHUNK, kind, 16)


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each test that asks for it runs on the native kernels and on the reference."""
    fastkd.use_backend(request.param)
    return str(request.param)
