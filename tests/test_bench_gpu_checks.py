"""The checks of a visit to a GPU can fail, kernels are right in every shape of a step, the device is asked rightly."""

from __future__ import annotations

import pathlib
from typing import Any
from unittest import mock

import pytest
import torch

import fastkd
from bench.gpu import (
    check_calls,
    check_hidden,
    check_logits,
    check_repeats,
    check_sparse,
    launch_table,
)
from bench.gpu.__main__ import _conclude
from bench.gpu.device import Cpu, Cuda, Device
from bench.gpu.findings import Findings
from bench.gpu.visit import Visit
from fastkd import reference
from fastkd.divergences import TABLE
from fastkd.kernels.gpu import rows as kernels
from tests import cases, compare
from tests.gpu_visits import Said, visiting
from tests.triton_interpreter import interpreted
from tools.machine_code.offline import TARGETS, compiled, threads

pytest.importorskip("triton")


# --- checks that can fail ----------------------------------------------------------------------------------------


def outcomes(visit: Any) -> set[bool]:
    assert visit.findings.said
    return {facts["ok"] for _, facts in visit.findings.said}


@pytest.mark.parametrize(("module", "parts"), [(check_logits, 29), (check_hidden, 37), (check_sparse, 31)])
def test_a_gradient_that_is_a_little_off_fails(module: Any, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = fastkd.kd_loss

    def off(*arguments: Any, **settings: Any) -> torch.Tensor:
        """By 2 %, but for the reference, which judges."""
        loss = exact(*arguments, **settings)
        judges = fastkd.backend.forced() == "reference"
        return loss if judges else loss.detach() + 1.02 * (loss - loss.detach())

    module.run(right := visiting(parts=parts))
    assert outcomes(right) == {True}
    monkeypatch.setattr(fastkd, "kd_loss", off)
    module.run(wrong := visiting(parts=parts))
    passed = [facts["name"] for _, facts in wrong.findings.said if facts["ok"]]
    assert all("V=1 " in name for name in passed), "of one token the gradient is 0"


def test_a_bit_that_differs_fails() -> None:
    calls = iter(range(100))
    step = lambda: (torch.ones(3), torch.tensor([1.0, 2.0 + (next(calls) == 4) * 1e-6, 3.0]))  # noqa: E731
    with pytest.raises(AssertionError, match="1 of 3 × 6 numbers differ"):
        check_repeats.judge(Cpu(), step, 3)


def test_a_failing_check_is_a_failing_visit(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = Findings(tmp_path / "findings" / "a.jsonl", step="calls", walk="sweeps")
    said.say("first", loss=1.0)
    with Visit(Cpu(), said, float("inf")).check("fine"):
        pass
    assert _conclude(tmp_path, dry=True) == 0
    with Visit(Cpu(), said, float("inf")).check("wrong"):
        compare.assert_value(torch.ones(1), torch.zeros(1))
    assert _conclude(tmp_path, dry=True) == 1
    assert "FAILED wrong [sweeps]: AssertionError: value: 1 of 1 off" in capsys.readouterr().out


def test_a_visit_without_a_loss_is_a_failing_visit(tmp_path: pathlib.Path) -> None:
    Findings(tmp_path / "findings" / "a.jsonl", step="facts", walk="sweeps").say("note")
    assert _conclude(tmp_path, dry=True) == 1


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("name", TABLE)
def test_at_the_sizes_of_a_visit_there_is_a_budget_for_every_strategy(name: str, dtype: torch.dtype) -> None:
    for sizes, device in ((check_hidden._VISIT, "cuda"), (check_hidden._DRY, "cpu")):
        found = check_hidden.budgets(sizes, dtype, device, TABLE[name]())
        assert found.keys() == {"default", "several chunks", "tiles"}


# --- the launch table --------------------------------------------------------------------------------------------


def test_a_setting_of_the_launch_table_is_what_is_compiled() -> None:
    (case,) = launch_table.cases(small=True)
    given = launch_table.arguments(Cpu(), case, 16)
    setting = launch_table.Setting(threads=256, vectors=1, registers=96)
    with compiled(TARGETS["sm_90"]) as found:
        with launch_table.shaped(setting):
            kernels.kd_rows(*given)
        kernels.kd_rows(*given)
    shaped, usual = found
    assert (threads(shaped), shaped.metadata.maxnreg) == (256, 96)
    assert (threads(usual), usual.metadata.maxnreg) == (128, 255)


@pytest.mark.parametrize("setting", launch_table.settings()[::5], ids=str)
def test_a_loss_is_right_in_every_shape(setting: launch_table.Setting) -> None:
    case = launch_table.Case("forward_kl", 2, 2500, torch.float32, torch.float32)
    given = launch_table.arguments(Cpu(), case, 2)
    with interpreted(), launch_table.shaped(setting):
        soft, hard = kernels.kd_rows(*given)
    outcomes = []
    for dtype in (torch.float64, torch.float32):
        grad = torch.empty(2, case.vocab, dtype=dtype)
        wide = given._replace(student=given.student.to(dtype), teacher=given.teacher.to(dtype), grad=grad)
        outcomes.append((*reference.kd_rows(*wide), grad))
    truth, eager = outcomes
    compare.assert_value(soft, truth[0], eager[0])
    compare.assert_value(hard, truth[1], eager[1])
    compare.assert_gradient(given.grad, eager[2], truth[2])


# --- the device that is not there --------------------------------------------------------------------------------


def test_the_twin_has_all_that_the_device_has() -> None:
    public = {name for name in vars(Cuda) if not name.startswith("_")}
    assert public <= set(vars(Device))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """On CPU tensors, with streams, events and graphs that only note what is asked of them."""
    device = object.__new__(Cuda)
    device.kind = "cpu"
    device.generator = torch.Generator()
    device._other = torch.zeros(4, dtype=torch.int32)
    asked = mock.MagicMock()
    for name in ("Stream", "stream", "current_stream", "Event", "CUDAGraph", "graph", "synchronize", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, getattr(asked, name))
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", asked.set_sync_debug_mode)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 2000))
    device.asked = asked  # type: ignore[attr-defined]
    return device


def test_a_time_is_taken_between_events_behind_a_busy_stream(cuda: Any) -> None:
    cuda.asked.Event.return_value.elapsed_time.return_value = 2.0
    assert cuda.seconds(lambda: cuda.asked.run()) == pytest.approx(2e-3)
    order = [name for name, _, _ in cuda.asked.mock_calls]
    wanted = ["_sleep", "Event().record", "run", "Event().record", "Event().synchronize", "Event().elapsed_time"]
    assert [name for name in order if name in wanted] == wanted


def test_a_graph_that_computes_nothing_is_seen(cuda: Any) -> None:
    """What was captured is emptied before the replay."""
    (found,) = cuda.replayed(lambda: (torch.ones(3),))
    assert not found.any()
    with pytest.raises(AssertionError, match="not the same bits"):
        check_calls._same((found,), (torch.ones(3),))


def test_what_the_device_is_asked_for_is_undone(cuda: Any) -> None:
    with pytest.raises(RuntimeError, match="waits"), cuda.no_synchronisation():
        raise RuntimeError("waits")
    assert [call.args for call in cuda.asked.set_sync_debug_mode.mock_calls] == [("error",), ("default",)]
    with mock.patch.object(torch, "mm"), cuda.disturbed():
        pass
    cuda.asked.Stream().synchronize.assert_called_once_with()
    assert cuda.elsewhere(lambda: (mock.MagicMock(),))
    assert cuda.rows_that_fit(64, 100) == 8
    assert cuda.poisoned(RuntimeError("CUDA error: an illegal memory access"))
    assert not cuda.poisoned(AssertionError("off"))


def test_a_poisoned_device_ends_the_process(cuda: Any) -> None:
    visit = Visit(cuda, Said(), float("inf"))  # type: ignore[arg-type]
    with visit.check("wrong"):
        raise AssertionError("off")
    with pytest.raises(RuntimeError, match="CUDA error"), visit.check("lost"):
        raise RuntimeError("CUDA error: an illegal memory access")
    assert [facts["ok"] for _, facts in visit.findings.said] == [False, False]
