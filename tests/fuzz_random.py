"""Random calls that are valid by the library's documentation, each made anew from nothing but its random numbers."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastkd
from tests import cases
from tests.fuzz_calls import LossCall, Operands, Sparse, laid_out
from tests.fuzz_formulas import log_softmax, token_scales

NARROW = (torch.float32, torch.bfloat16, torch.float16)
OBJECTS: dict[str, Any] = {
    "forward_kl": fastkd.ForwardKL, "reverse_kl": fastkd.ReverseKL, "jsd": fastkd.JSD, "skew_kl": fastkd.SkewKL,
    "skew_reverse_kl": fastkd.SkewReverseKL, "symmetric_kl": fastkd.SymmetricKL, "tvd": fastkd.TVD,
    "squared_hellinger": fastkd.SquaredHellinger, "alpha_beta": fastkd.AlphaBeta, "mse": fastkd.MSE,
}  # fmt: skip
#: Parameters behind a bare name.
USUAL = {"jsd": (0.5,), "skew_kl": (0.1,), "skew_reverse_kl": (0.1,), "symmetric_kl": (0.5,), "alpha_beta": (0.2, 0.7)}
#: Where the formula of the α-β family changes.
LIMITS = ((0.5, 0.5), (0.0, 0.5), (0.5, 0.0), (0.5, -0.5), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))


def loss_call(draw: random.Random) -> LossCall:
    """One valid call."""
    generator = torch.Generator().manual_seed(draw.getrandbits(60))
    sparse = draw.random() < 0.25
    family = draw.choice(("near_equal", "far", "far", "peaked", "flat", "offset", "masked", "teacher masked"))
    name, parameters, family = _divergence(draw, sparse, family)
    settings = _settings(draw, name, parameters)
    leading = _leading(draw, settings)
    width = max(vocabulary(draw), 2 if min(parameters, default=0) < 0 else 1)  # see `_sparse`
    dtype = draw.choices((*NARROW, torch.float64), (10, 4, 4, 2))[0]
    if family == "offset" and (dtype not in (torch.float32, torch.float64) or name == "mse"):
        family = "far"
    student_projected, teacher_projected = draw.random() < 0.35, draw.random() < 0.35
    if family in ("masked", "teacher masked", "offset"):
        student_projected = teacher_projected = False
    call = LossCall(settings, (name, parameters), Operands([], {}, []), None, None, None, None, _backend(draw, dtype))
    call.notes += [family, str(dtype)]
    rows, banned = math.prod(leading), torch.zeros(width, dtype=torch.bool)
    student, teacher = _values(generator, family, rows, width)
    if "masked" in family:
        banned[torch.randperm(width, generator=generator)[: draw.randrange(width)]] = True
        teacher[:, banned] = -math.inf
        if family == "masked":
            student[:, banned] = -math.inf

    padding = draw.choice((0, 0, 0, 1, 7)), draw.choice((0, 0, 0, 3, 16))
    if any(padding) or draw.random() < 0.1:
        settings["vocab_size"] = width if any(padding) else width - (width > 4 and "masked" not in family)
    inplace = not student_projected and settings["reduction"] != "none" and draw.random() < 0.2
    settings.update({"inplace": True} if inplace else {})
    if student_projected:
        call.student = random_projection(draw, generator, family, (*leading, 0), width + padding[0], dtype)
        student = call.student.logits().float().reshape(rows, width + padding[0])[:, :width]
    else:
        call.student = _logits(draw, student.to(dtype).view(*leading, width), padding[0], inplace)
    if family == "near_equal":
        teacher = student + 1e-2 * torch.randn(student.shape, generator=generator)
    beside = dtype if dtype == torch.float64 or draw.random() < 0.6 else draw.choice(NARROW)
    if call.term_weights[0] == 0 and draw.random() < 0.5:
        call.teacher = None
    elif sparse:
        call.teacher = _sparse(draw, generator, call, teacher[:, : call.columns].double(), leading)
    elif teacher_projected:
        call.teacher = random_projection(draw, generator, family, (*leading, 0), width + padding[1], beside)
    else:
        call.teacher = _logits(draw, teacher.to(beside).view(*leading, width), padding[1], False)
    if isinstance(call.teacher, Operands):
        call.teacher.wants = [False] * len(call.teacher.tensors)
    _labels_and_weights(draw, generator, call, leading, banned)
    _poison(draw, call)
    # Mostly 1 and other powers of two, which cost a gradient in 16 bits no second rounding.
    factor = draw.choice((1.0, 1.0, 1.0, 0.5, -2.0, 1024.0, 2.0**-10, 2.5, -0.7))
    scalar = torch.tensor(factor, dtype=_loss_dtype(dtype))
    per_token = torch.randn(call.scored(torch.zeros(leading)).shape, generator=generator, dtype=_loss_dtype(dtype))
    call.upstream = per_token if settings["reduction"] == "none" else scalar
    if draw.random() < 0.1:
        defaults = torch.float64, torch.bfloat16, torch.float16, torch.device("meta")
        call.ambient = draw.choice((*defaults, torch.autocast("cpu", torch.bfloat16)))
    return call


def _loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _backend(draw: random.Random, dtype: torch.dtype) -> str | None:
    return draw.choice((None, "reference")) if dtype == torch.float64 else draw.choice((None, None, "cpu", "reference"))


def _divergence(draw: random.Random, sparse: bool, family: str) -> tuple[str, tuple[float, ...], str]:
    """A divergence with its parameters, and the family, or a tamer one where the divergence would be infinite."""
    name = draw.choice([name for name in OBJECTS if not (sparse and name == "mse")])
    parameters: tuple[float, ...] = USUAL.get(name, ())
    if parameters and draw.random() < 0.7:
        value = draw.choice((0.0, 0.1, 0.9, round(draw.random(), 3)))
        parameters = (draw.choice((value, 1.0)) if name in ("jsd", "symmetric_kl") else value,)
        if name == "alpha_beta":
            parameters = draw.choice(LIMITS) if draw.random() < 0.6 else _powers(draw)
    if family == "teacher masked" and not (
        name in ("forward_kl", "tvd", "skew_kl")
        or (name in ("jsd", "skew_reverse_kl") and 0 < parameters[0] < 1)
        or (name == "symmetric_kl" and parameters[0] == 1)
    ):
        family = "masked"
    if family == "masked" and (name == "mse" or (name == "alpha_beta" and min(parameters) <= 0)):
        family = "far"
    if family == "peaked" and name == "alpha_beta" and (min(parameters) < 0 or sum(parameters) == 0):
        family = "far"  # powers of p/q beyond what fp32 holds
    return name, parameters, family


def _powers(draw: random.Random) -> tuple[float, ...]:
    while True:
        alpha, beta = round(draw.uniform(-0.5, 1.5), 2), round(draw.uniform(-0.5, 1.5), 2)
        if min(abs(alpha), abs(beta), abs(alpha + beta)) >= 0.05:
            return alpha, beta


def _temperature(draw: random.Random) -> Any:
    usual = (1, 2, 3.0, 4, 1.0, 2.0, 0.5, 1.5, round(draw.uniform(0.4, 8), 2), round(draw.uniform(0.4, 8), 2))
    return draw.choice((*usual, np.float32(2.5), np.float64(3), np.int64(2), draw.choice((0.2, 40.0))))


def _settings(draw: random.Random, name: str, parameters: tuple[float, ...]) -> dict[str, Any]:
    usual = parameters == USUAL.get(name, ()) and draw.random() < 0.5
    settings: dict[str, Any] = {
        "divergence": name if usual else OBJECTS[name](*parameters),
        "reduction": draw.choice(("mean", "sum", "none", "batchmean")),
    }
    if draw.random() < 0.8:
        settings["temperature"] = _temperature(draw)
    if name == "alpha_beta" and min(parameters) < 0 and float(settings.get("temperature", 2)) < 1:
        settings["temperature"] = 1
    if draw.random() < 0.15:
        settings["teacher_temperature"] = settings.get("temperature", 2) if min(parameters, default=0) < 0 else 1.7
    if draw.random() < 0.12:
        settings.update(alpha=draw.choice((0, 1, 0.3, 0.9)), alpha_on=draw.choice(("soft", "hard")))
    elif draw.random() < 0.7:
        soft, hard = draw.choice(((1, 0), (0, 1), (1.0, 1.0), (0.3, 2.0), (np.float32(0.25), 0.75), (5, 0.01)))
        settings.update(soft_weight=soft, hard_weight=hard)
    for switch, often in (("scale_t2", 0.2), ("mask_soft", 0.25), ("shift", 0.3), ("return_parts", 0.25)):
        if draw.random() < often:
            settings[switch] = switch in ("shift", "return_parts")
    if draw.random() < 0.3:
        settings["ignore_index"] = draw.choice((-1, 0, 5, -7, 255, np.int64(-100)))
    if draw.random() < 0.35:
        settings["memory_budget"] = draw.choice((30_000, 90_000, 200_000, 1 << 20, 1 << 28))
    return settings


def _leading(draw: random.Random, settings: dict[str, Any]) -> tuple[int, ...]:
    """Shape of the tokens."""
    n, m, few = draw.randint(1, 12), draw.randint(1, 9), draw.randint(1, 3)
    shapes: list[tuple[int, ...]] = [(n,), (n,), (few, m), (few, m), (few, m), (m, few), (2, few, m)]
    shapes += draw.choice(([()], [(0,)], [(2, 0)], [(0, 3)], [(40,)], [(2, 2, 3, 2)]))
    shape = draw.choice(shapes)
    if not shape and (settings.get("shift") or settings["reduction"] == "batchmean"):
        return (n,)
    return (*shape[:-1], 1) if settings.get("shift") and shape[-1] == 0 else shape


def vocabulary(draw: random.Random) -> int:
    sizes = draw.randint(1, 40), draw.randint(1, 40), draw.randint(41, 300), draw.randint(41, 300)
    return draw.choice((*sizes, draw.choice((1, 2, 1023, 1024, 1025, 2049, 3001))))


def _values(generator: torch.Generator, family: str, rows: int, width: int) -> tuple[Tensor, Tensor]:
    return cases.FAMILIES.get(family, cases.far)(generator, rows, width)


def _padded(draw: random.Random, values: Tensor, dimension: int, extra: int) -> Tensor:
    """More columns, of numbers that must not count."""
    if extra == 0:
        return values
    shape = list(values.shape)
    shape[dimension] = extra
    filler = torch.full(shape, draw.choice((0.0, 100.0, math.nan, math.inf)), dtype=values.dtype)
    return torch.cat((values, filler), dimension)


def _logits(draw: random.Random, values: Tensor, extra: int, regular: bool) -> Operands:
    return Operands([laid_out(draw, _padded(draw, values, -1, extra), 0.6, regular)], {}, [draw.random() < 0.93])


def random_projection(
    draw: random.Random, generator: torch.Generator, family: str, shape: tuple[int, ...], width: int, dtype: torch.dtype
) -> Operands:
    hidden = draw.choice((1, 3, 8, 16, 24))
    scale = {"peaked": 12.0, "flat": 0.01}.get(family, 3.0)

    def operand(*sizes: int) -> Tensor:
        own = dtype if dtype == torch.float64 or draw.random() < 0.7 else draw.choice(NARROW)
        return torch.randn(sizes, generator=generator).to(own)

    tensors = [operand(*shape[:-1], hidden), operand(width, hidden) * (scale / hidden**0.5)]
    if draw.random() < 0.5:
        tensors.append(operand(width))
    tensors = [laid_out(draw, x, 0.3) for x in tensors]
    head: dict[str, float] = {}
    if draw.random() < 0.25:
        head["softcap"] = draw.choice((5, 30.0, 10.0))
    if draw.random() < 0.25:
        head["logit_scale"] = draw.choice((0.0625, 0.5, 2, 1.3))
    wants = draw.choice(([True] * 3, [True] * 3, [True, False, False], [draw.random() < 0.5 for _ in range(3)]))
    return Operands(tensors, head, wants[: len(tensors)])


def _sparse(
    draw: random.Random, generator: torch.Generator, call: LossCall, teacher: Tensor, leading: tuple[int, ...]
) -> Sparse:
    """What a cache would keep of these rows: the likeliest K with or without the others' mass, or draws."""
    rows, width = teacher.shape
    temperature = call.teacher_temperature
    log_p = log_softmax(teacher / temperature) if rows else teacher
    entropy = -(log_p.exp() * torch.where(log_p == -math.inf, 0.0, log_p)).sum(-1)
    entries = min(width, draw.choice((1, 2, 5, 12, 17, 64)))
    if min(call.divergence[1], default=0) < 0:  # else a rest of nothing is raised to a negative power
        entries = min(entries, max(width - 1, 1))
    kind = draw.choice(("ghost", "renormalize", "sampled")) if call.divergence[0] == "forward_kl" else "ghost"
    if kind == "sampled":
        draws = entries + 3
        chosen = torch.multinomial(log_p.exp(), draws, replacement=True, generator=generator) if rows else None
        counts = torch.zeros_like(log_p)
        if chosen is not None:
            counts.scatter_add_(-1, chosen, torch.ones(rows, draws, dtype=torch.float64))
        weights = (counts / draws).log()
        top, ids = weights.topk(min(width, draws), -1)
    else:
        top, ids = log_p.topk(entries, -1)
    rest = torch.logsumexp(log_p.scatter(-1, ids, -math.inf), -1)
    ids = torch.where(top == -math.inf, draw.choice((0, -1, 10**6)), ids)  # absent: whatever the id
    if draw.random() < 0.5 and rows:
        order = torch.rand(ids.shape, generator=generator).argsort(-1)
        top, ids = top.gather(-1, order), ids.gather(-1, order)
    dtype = draw.choice((torch.float32, torch.float32, torch.float64, torch.float16))
    targets = Sparse(ids.view(*leading, -1) if rows else ids.view(*leading, ids.shape[-1]), top, kind, temperature)
    targets.logprobs = laid_out(draw, top.to(dtype).view(targets.ids.shape), 0.3)
    targets.ids = laid_out(draw, targets.ids.to(draw.choice((torch.int64, torch.int64, torch.int32))), 0.3)
    if kind == "ghost":
        left = 1 - targets.logprobs.double().exp().sum(-1)
        if draw.random() < 0.6 or bool((left < 1e-3).any()):  # else too little is left to be told from rounding
            targets.rest = rest.to(torch.float64 if dtype == torch.float64 else torch.float32).view(leading)
    if kind == "sampled" and draw.random() < 0.5:
        targets.entropy = entropy.to(dtype).view(leading)
    return targets


def _labels_and_weights(
    draw: random.Random, generator: torch.Generator, call: LossCall, leading: tuple[int, ...], banned: Tensor
) -> None:
    columns, ignored = call.columns, int(call.setting("ignore_index"))
    if call.term_weights[1] > 0 or draw.random() < 0.5:
        choices = (~banned[:columns]).nonzero()[:, 0]
        picks = torch.randint(max(len(choices), 1), leading, generator=generator)
        labels = choices[picks] if len(choices) else picks
        masked = torch.rand(leading, generator=generator) < draw.choice((0.0, 0.0, 0.3, 0.6, 1.0))
        labels = torch.where(masked, ignored, labels)
        dtype = draw.choice((torch.int64, torch.int64, torch.int32, torch.int16))
        if columns <= 256 and 0 <= ignored < 256 and draw.random() < 0.3:
            dtype = torch.uint8
        call.labels = laid_out(draw, labels.to(dtype), 0.3)
    if draw.random() < 0.35:
        weights = torch.rand(leading, generator=generator) * draw.choice((1.0, 3.0))
        weights = weights * (torch.rand(leading, generator=generator) < draw.choice((1.0, 1.0, 0.6, 0.0)))
        kinds = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)
        call.weights = laid_out(draw, weights.to(draw.choice(kinds)), 0.3)
    if call.settings["reduction"] == "mean" and draw.random() < 0.3:
        number = draw.choice((1, 7, 12.5, 1000, 0))
        forms = (number, np.float32(number), np.int64(number), torch.tensor(number), torch.tensor([float(number)]))
        call.num_items = draw.choice((number, *forms))


def _poison(draw: random.Random, call: LossCall) -> None:
    """Tokens that do not count may hold anything."""
    if draw.random() > 0.4:
        return
    leading = call.student.shape[:-1]
    soft, hard = (scale.reshape(-1) != 0 for scale in token_scales(call))
    dead = torch.ones(leading.numel(), dtype=torch.bool)
    dead[call.scored_rows()[soft | hard]] = False
    if not dead.any():
        return
    call.notes.append("poisoned")
    poison = draw.choice((math.nan, math.inf, -math.inf))
    sides = [call.student.tensors[0]]
    if isinstance(call.teacher, Operands):
        sides.append(call.teacher.tensors[0])
    elif call.teacher is not None:
        sides.append(call.teacher.logprobs)
        call.teacher.ids[dead.view(leading)] = draw.choice((-5, 10**6))
    for side in sides:
        side[dead.view(leading)] = poison
