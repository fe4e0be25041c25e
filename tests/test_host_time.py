"""What a loss costs the host, and what it launches: small calls and GPUs wait for it."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from tools import host_time


def test_a_training_call_launches_at_most_six_times() -> None:
    """Two terms, shifted labels, the mean, bf16; the rows' kernel and the scaling of its gradient are among them."""
    found = host_time.launches(host_time.training_step())
    assert {"row_scales", "kd_rows", "weighted_total", "scale_"} <= set(found)
    assert len(found) <= 6, found


def test_what_computes_is_counted_and_what_does_not_is_not() -> None:
    numbers = torch.ones(4, 3)
    assert host_time.launches(lambda: (numbers.view(3, 4)[1:].t().detach(), torch.empty_like(numbers))) == []
    assert host_time.launches(lambda: numbers + numbers) == ["aten::add"]
    assert host_time.launches(lambda: (torch.ones_like(numbers), numbers.double())) == ["aten::fill_", "aten::copy_"]


def test_the_host_is_not_kept_waiting() -> None:
    """Beside a unit of the same kind of work: as much as 4 or 5 of it; with `register_autograd`, 13.

    The best of three, since others may use the machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    contenders: dict[str, host_time.Contender] = {
        "loss": (host_time.stand_in, host_time.training_step()),
        "unit": (nullcontext, host_time.unit_of_host_time()),
    }
    ratios = []
    for _ in range(3):
        found = host_time.microseconds(contenders, rounds=10)
        ratios.append(found["loss"] / found["unit"])
    torch.set_num_threads(threads)
    assert min(ratios) < 7, ratios


@pytest.mark.parametrize("context", [host_time.stand_in, host_time.triton_stand_in])
def test_stand_ins_compute_nothing_and_leave_nothing_behind(context: object) -> None:
    if context is host_time.triton_stand_in:
        pytest.importorskip("triton")
    step = host_time.training_step((2, 3), vocab=40)
    taken = host_time.microseconds({"within": (context, step)}, rounds=1, calls=1)  # type: ignore[dict-item]
    assert taken["within"] > 0
    step()  # on the CPU backend again, which reads labels


def test_the_current_device_is_changed_only_where_it_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from fastkd.kernels.gpu.launch import device_of

    changed = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: changed.append(device.index) or nullcontext())
    for index in (0, 1):
        with device_of(SimpleNamespace(device=torch.device("cuda", index))):  # type: ignore[arg-type]
            assert changed == [1][:index]
