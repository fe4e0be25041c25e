"""Frozen teachers in parts say what whole ones do; what cannot be in parts stays whole, or is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastkd
from fastkd.teachers import Frozen, Mixed, Routed
from fastkd.terms import AttentionTerm, Batch, HiddenStateTerm, KDTerm, Terms, outputs_of
from fastkd.training.options import InputError
from fastkd.training.sharding import check_sharding, is_sharded, shard_frozen
from tests.processes import run
from tests.training.conftest import changed
from tests.training.test_trainer import VOCAB, model, teacher, windows

SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
COUNTED = VOCAB - 3  # where the heads are padded


class Alone:
    """An accelerator without a mesh of its own."""


def losses(rank: int) -> list[list[float]]:
    """Of what whole teachers and sharded ones say of this rank's rows, by every kind of reader."""
    found = []
    for sharded in (False, True):
        found.append([])
        for dtype in (torch.float32, torch.bfloat16):
            models = [teacher().to(dtype), model(3).to(dtype).eval().requires_grad_(False)]
            for one in models if sharded else []:
                shard_frozen(one, Alone())
                assert is_sharded(one)
            frozen = Frozen(models[0])
            for mode, terms, counted in (
                (frozen, [], None),
                (frozen, [], COUNTED),
                (frozen, [AttentionTerm(relation="qk"), HiddenStateTerm()], None),
                (Mixed(models, [0.25, 0.75]), [], COUNTED),
            ):
                found[-1].append(loss_of(mode, terms, counted, windows()[4 * rank : 4 * rank + 4]))
    return found


def loss_of(mode, terms, counted, ids) -> float:
    student = model(0)
    every = Terms([KDTerm(fastkd.KDLoss(shift=True, vocab_size=counted)), *terms], student)
    every.check(student, mode.model)
    mode.check(student, every.needs, counted)
    inputs = {"input_ids": ids}
    said = mode.outputs(student, inputs, needs=every.teachers_needs)
    labels = ids.clamp(max=COUNTED - 1)
    return every(outputs_of(student, inputs, every.students_needs), said, Batch(labels, inputs)).item()


def test_sharded_teachers_say_what_whole_ones_do():
    for whole, sharded in run(2, losses):
        assert sharded == whole
        assert len(set(whole)) == len(whole) == 8


class Packed(nn.Parameter):
    """What libraries of quantisation put in the place of weights."""


@pytest.mark.parametrize("kind", ["integers", "subclass", "said"])
def test_quantised_teachers_stay_whole(kind):
    """Where no process group exists, sharding would raise."""
    one = teacher()
    head = one.get_output_embeddings()
    if kind == "integers":
        head.weight = nn.Parameter(head.weight.to(torch.int8), requires_grad=False)
    elif kind == "subclass":
        head.weight = Packed(head.weight.detach(), requires_grad=False)
    else:
        one.is_quantized = True
    shard_frozen(one, Alone())
    assert not is_sharded(one)
    assert type(one) is type(teacher())


def test_which_teachers_run_for_every_batch():
    first, second = teacher(), teacher()
    assert Mixed([first, second], [1.0, 0.0]).in_step == [first]
    assert Frozen(first).in_step == [first]
    assert Routed([first, second]).in_step == []


@pytest.mark.parametrize(
    ("environment", "values", "message"),
    [
        ({"FSDP_VERSION": "1"}, {}, "configured for FSDP 1: set fsdp_version: 2"),
        ({"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, {}, "keep a SHARDED_STATE_DICT"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "set fsdp_cpu_ram_efficient_loading: false"),
        ({}, {"teacher_mode": "ema"}, "teacher_mode is 'ema', but beside a sharded student teach: frozen"),
        ({}, {"lora_rank": 2}, "adapters are not sharded"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2"}, {}, "configured for DeepSpeed"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16", "WORLD_SIZE": "2"}, {"bf16": False}, "mixed precision in bf16, but"),
    ],
)
def test_what_a_sharded_student_cannot_learn_by(options, monkeypatch, environment, values, message):
    for name, value in {**SHARDED, **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        check_sharding(changed(options, **values), torch.device("cuda"))
