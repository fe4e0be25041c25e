"""What ARCHITECTURE.md says of adding things holds: each place that a new thing needs is missed where it is absent."""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fastkd
from fastkd import backend, reference, sources
from fastkd.call import Call, call_for
from fastkd.projection.columns import columns_of
from fastkd.projection.teachers import rows_at_hand, teacher_side
from fastkd.rows import RowSpec

SPEC = RowSpec("forward_kl", (), 2.0, 2.0, 1.0, 0.0, 5)
#: Functions of `Backend` that a row may lack: the reference takes no tiles.
OPTIONAL = {"reference": {"tile_state", "state_fields"}}

HALF = torch.full((3,), 0.5).log()
ONE_OF_EACH: list[Any] = [
    torch.zeros(3, 5),
    fastkd.Projection(torch.zeros(3, 2), torch.zeros(5, 2), torch.zeros(5), softcap=30.0, logit_scale=0.5),
    fastkd.SparseTargets(torch.tensor([[1], [2], [0]]), HALF[:, None], "ghost", 2.0, rest=HALF),
    fastkd.SparseTargets(torch.tensor([[1], [2], [0]]), HALF[:, None], "sampled", 2.0, entropy=HALF),
    fastkd.Mixture([torch.eye(3, 5), fastkd.Projection(torch.eye(3, 2), torch.eye(5, 2), softcap=3.0)], [0.25, 0.75]),
]


@pytest.fixture
def shard() -> Iterator[fastkd.VocabShard]:
    """A rank's, of which there have to be several before a loss can be computed."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield fastkd.VocabShard(ONE_OF_EACH[1], 2, 9)
    dist.destroy_process_group()


@pytest.mark.parametrize("name", backend._ROWS)
def test_a_backend_offers_every_function_and_takes_its_arguments(name: str) -> None:
    module = backend._ROWS[name].module
    if name == "triton":
        pytest.importorskip("triton")
    offered = importlib.import_module(module)
    for function, signature in vars(backend.Backend).items():
        if function.startswith("_") or function in OPTIONAL.get(name, ()):
            continue
        assert hasattr(offered, function), f"{module} lacks {function}"
        wanted = [p for p in inspect.signature(signature).parameters if p not in ("self", "tile")]
        found = [p for p in inspect.signature(getattr(offered, function)).parameters if p != "tile"]
        assert found == wanted, f"{module}.{function}"


def test_one_module_and_one_row_make_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def kd_rows(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(arguments)
        return reference.kd_rows(*arguments)

    module = types.ModuleType("made_here")
    vars(module).update({name: getattr(reference, name) for name in reference.__all__ if name != "DIVERGENCES"})
    vars(module)["kd_rows"] = kd_rows
    monkeypatch.setitem(__import__("sys").modules, "made_here", module)
    monkeypatch.setitem(
        backend._ROWS,
        "made",
        backend._Row("made_here", (), lambda: backend.BackendStatus(True, "for this test"), lambda *_: 0),
    )
    student, teacher = torch.randn(2, 4, 9).unbind()
    hidden, weight = torch.randn(4, 3), torch.randn(9, 3, requires_grad=True)
    kd = fastkd.KDLoss(hard_weight=0)
    expected = [kd(student, teacher), kd(fastkd.Projection(hidden, weight), teacher)]
    with fastkd.use_backend("made"):
        found = [kd(student, teacher), kd(fastkd.Projection(hidden, weight), teacher)]
    torch.testing.assert_close(found, expected)
    assert len(asked) == 2
    assert fastkd.backends()["made"].detail == "for this test"


def test_a_source_is_put_together_from_its_parts(shard: fastkd.VocabShard) -> None:
    for source in (*ONE_OF_EACH, shard):
        call = call_for(torch.zeros(3, 5), source, None, None, None, SPEC)
        assert is_put_together(call.teacher_source(), source), type(source)


def is_put_together(again: Any, source: Any) -> bool:
    if isinstance(source, torch.Tensor):
        return again is source
    if isinstance(source, tuple):
        return all(is_put_together(*pair) for pair in zip(again, source, strict=True))
    if type(source) in sources._COMPOSED:
        return type(again) is type(source) and is_put_together((*vars(again).values(),), (*vars(source).values(),))
    return bool(again == source)


@pytest.mark.parametrize("source", ONE_OF_EACH, ids=lambda source: type(source).__name__)
def test_a_source_reaches_the_backend_from_logits_and_from_hidden_states(source: Any) -> None:
    logits = fastkd.Projection(torch.randn(3, 2), torch.randn(5, 2))
    kd = fastkd.KDLoss(hard_weight=0)
    torch.testing.assert_close(kd(logits, source), kd(logits.logits(), source))
    assert kd(logits, source) != 0


def test_a_source_that_nobody_knows_is_no_silent_zero() -> None:
    call = call_for(torch.zeros(3, 5), torch.zeros(3, 5), None, torch.ones(3), None, SPEC)
    with pytest.raises(TypeError, match="rows of a str"):
        rows_at_hand("a teacher", call)  # type: ignore[arg-type]


def test_every_source_has_parts_fields_and_a_side(shard: fastkd.VocabShard) -> None:
    composed = set(sources._COMPOSED)
    every = [*ONE_OF_EACH, shard]
    assert composed == {type(source) for source in every if not isinstance(source, torch.Tensor)}
    filled = {name for source in every for side in ("student", "teacher") for name in sources.parts(side, source)}
    assert {name for name in Call._fields if name.startswith(("student", "teacher"))} <= filled | {
        "teacher_temperature"
    }
    for source in ONE_OF_EACH:
        scale = torch.ones(3)
        call = call_for(torch.zeros(3, 5), source, None, scale, None, SPEC)
        side = teacher_side(call, columns_of(call))
        assert side is not None
        side.allocate(3, 3, 5)
        side.start(slice(0, 3))
        assert side.logits(slice(0, 5), slice(0, 3)) is not None
