"""What the planner asks of a GPU: its free memory, never while a graph is captured, and its rates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastkd.projection import devices

CUDA = torch.device("cuda", 0)


class Card:
    """Answers as `torch.cuda` would."""

    def __init__(self) -> None:
        self.free, self.reserved, self.allocated = 50, 20, 15
        self.capturing, self.asked, self.broken = False, 0, False

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        assert not self.capturing, "asked while a graph is captured"
        self.asked += 1
        if self.broken:
            raise RuntimeError("not supported")
        return self.free, 100

    def memory_stats_as_nested_dict(self, device: torch.device) -> dict[str, Any]:
        sizes = {"reserved_bytes": self.reserved, "allocated_bytes": self.allocated}
        return {name: {"all": {"current": size}} for name, size in sizes.items()} if self.reserved else {}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    card = Card()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", card.mem_get_info)
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", card.memory_stats_as_nested_dict)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: card.capturing)
    devices._answers.clear()
    yield card
    devices._answers.clear()


def test_free_is_what_the_driver_has_and_what_the_allocator_keeps(card: Card) -> None:
    assert devices.free_bytes(CUDA) == 50 + 20 - 15
    card.reserved = 0  # nothing was allocated yet
    assert devices.free_bytes(CUDA) == 50


def test_while_a_graph_is_captured_the_last_answer_counts(card: Card) -> None:
    card.capturing = True
    assert devices.free_bytes(CUDA) is None
    card.capturing = False
    assert devices.free_bytes(CUDA) == 55
    card.capturing, card.free = True, 10
    assert devices.free_bytes(CUDA) == 55
    assert devices.free_bytes(torch.device("cuda", 1)) is None
    assert card.asked == 1


def test_who_cannot_tell_is_not_taken_for_full(card: Card) -> None:
    card.broken = True
    assert devices.free_bytes(CUDA) is None
    assert devices.free_bytes(torch.device("cpu")) is None
    assert devices.free_bytes(torch.device("meta")) is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA B200", "B200"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_rates_by_name(name: str, kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert devices.gpu_of(CUDA) == (None if kind is None else devices.GPUS[kind])
    assert devices.gpu_of(torch.device("cpu")) is None
