"""Random calls of the library, valid and invalid, judged by float64: `python -m tests.fuzz --calls 100000 --seed 7`.

A call is made from a seed and an index alone. Valid ones (`fuzz_random`) must give the values and every gradient that
the definitions give (`fuzz_formulas`), as must the eager reference in float64, and must touch no other memory. Invalid
ones (`fuzz_invalid`) must give one TypeError or ValueError that names what is wrong, before any work. What is valid is
said there, by the documentation, and not taken from the library's checks.

A failure names the command that runs it alone.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import fastkd
from fastkd.projection.plan import _LEAST_CHUNK
from tests import compare, fuzz_invalid, fuzz_statistics
from tests.fuzz_calls import LossCall, Operands, untouched, within
from tests.fuzz_formulas import Expected, expected
from tests.fuzz_random import loss_call

#: Of a hundred calls so many are invalid, and so many of `log_softmax` or `row_statistics`.
INVALID, STATISTICS = 30, 10

#: Gradients in fp16 are stored so that the largest that logits in fp16 could have fits, and end at its smallest number
#: (`_reach`); elsewhere exponentials do, times logarithms of hundreds.
SMALLEST = {torch.float16: 2.0**-22}
TEMPERATURES = ("temperature", "teacher_temperature")
REFERENCE = "the reference in float64: "


class Outcome:
    """What the library gave: values, and the gradients of the tensors that asked for one."""

    def __init__(self, call: LossCall, double: bool = False) -> None:
        """Make the call; `double`: its float64 twin on the eager reference, from plain tensors."""
        student, teacher, settings = call.student, call.teacher, dict(call.settings)
        leaves = [x.detach() for x in student.tensors]
        if double:
            leaves = [_wide(x, student) for x in leaves]
            settings.pop("inplace", None)
            settings.pop("memory_budget", None)
        for leaf, wanted in zip(leaves, student.wants, strict=True):
            leaf.requires_grad_(wanted)
        source = student.source(leaves)
        if isinstance(teacher, Operands):
            beside = teacher.source([_wide(x, teacher) for x in teacher.tensors] if double else None)
        else:
            beside = None if teacher is None else teacher.source()
        if double:
            source, beside = (x.logits() if isinstance(x, fastkd.Projection) else x for x in (source, beside))
        backend = "reference" if double else call.backend
        with (
            within(None if double else call.ambient),
            fastkd.use_backend(backend) if backend else contextlib.nullcontext(),
        ):
            kd = fastkd.KDLoss(**settings)
            result = kd(source, beside, call.labels, weights=call.weights, num_items=call.num_items)
            parts = result if kd.return_parts else (result,)
            self.values = [x.detach().clone() for x in parts]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            self.gradients: Sequence[Tensor] = []
            if wanted:
                upstream = call.upstream.to(parts[0].dtype)
                self.gradients = torch.autograd.grad(parts[0], wanted, upstream, allow_unused=True)
        self.leaves = wanted


def _wide(tensor: Tensor, side: Operands) -> Tensor:
    """In float64. What does not count in a projection may be NaN, and 0 times NaN would reach products here."""
    tensor = tensor.detach().double().contiguous()
    return tensor.nan_to_num(0.0, 0.0, 0.0) if side.is_projection else tensor


# --- valid calls ------------------------------------------------------------------------------------------------


def check_loss(call: LossCall, change: Callable[[Outcome], None] | None = None) -> None:
    """Raise AssertionError where a valid call does not give what it must. `change` falsifies the outcome first."""
    truth, in_place = expected(call), call.setting("inplace")
    assert all(x.isfinite().all() for x, _ in (truth.loss, *truth.gradients)), "the call has no finite loss"
    judge(call, Outcome(call, double=True), truth, torch.float64, REFERENCE)
    sides = [side for side in (call.student, call.teacher) if isinstance(side, Operands)]
    passed = [*(x for side in sides for x in side.tensors), call.labels, call.weights]
    with _few_tokens_stand_for_many(call), untouched(passed, call.student.tensors[0] if in_place else None):
        outcome = _within_budget(call)
        if change is not None:
            change(outcome)
        for gradient, leaf in zip(outcome.gradients, outcome.leaves, strict=True):
            assert gradient is not None, "no gradient"
            assert (gradient.dtype, gradient.shape) == (leaf.dtype, leaf.shape), "gradient unlike its tensor"
        double = call.student.tensors[0].dtype == torch.float64
        assert outcome.values[0].dtype == (torch.float64 if double else torch.float32), "dtype of the loss"
        judge(call, outcome, truth, outcome.values[0].dtype)


def judge(call: LossCall, outcome: Outcome, truth: Expected, arithmetic: torch.dtype, who: str = "") -> None:
    scaled = 1.0 if call.setting("reduction") == "none" else float(call.upstream)
    slack = 1000 if who == REFERENCE else 1  # in float64 both may lose three digits of fourteen to an offset
    for name, value, (exact, size) in zip(("loss", "soft", "hard"), outcome.values, truth[:3], strict=False):
        compare.assert_elements(value, exact, size * slack, arithmetic, f"{who}{name}")
    names = [name for name, wanted in zip(("student", "weight", "bias"), call.student.wants, strict=False) if wanted]
    for name, gradient, (exact, size) in zip(names, outcome.gradients, truth.gradients, strict=True):
        gradient = torch.zeros_like(exact) if gradient is None else gradient
        smallest = SMALLEST[gradient.dtype] * _reach(call) if gradient.dtype in SMALLEST else 1e-32
        smallest *= truth.largest
        compare.assert_elements(gradient, exact, size * slack, arithmetic, f"{who}gradient of {name}", smallest, scaled)


def _reach(call: LossCall) -> float:
    """How far gradients may reach beyond their row's scale, by the largest difference that fp16 logits can have."""
    student, teacher = (float(call.setting(name) or call.setting("temperature")) for name in TEMPERATURES)
    return max(1.0, (1 / student + 1 / teacher) / 2 / student)


def _within_budget(call: LossCall) -> Outcome:
    """A budget may be too small; then the error names one that is enough, for each of at most two passes."""
    for _ in range(2):
        try:
            return Outcome(call)
        except ValueError as error:
            needed = fuzz_invalid.needed_bytes(error)
            if needed is None or call.settings.get("memory_budget", needed) >= needed:
                raise
            call.settings["memory_budget"] = needed
    return Outcome(call)


@contextlib.contextmanager
def _few_tokens_stand_for_many(call: LossCall) -> Iterator[None]:
    """Tiles are planned where fewer tokens than a call here has would fit: plan as if they were enough."""
    least = _LEAST_CHUNK["cpu"]
    _LEAST_CHUNK["cpu"] = 16 if call.settings.get("memory_budget", 1) % 3 else least
    try:
        yield
    finally:
        _LEAST_CHUNK["cpu"] = least


# --- one call by its number -------------------------------------------------------------------------------------


def check(seed: int, index: int) -> str:
    """Make and judge one call; its kind. Raises AssertionError with all that is needed to make it again."""
    draw = random.Random(f"{seed}:{index}")
    share = draw.random() * 100
    described = "it could not be made"
    try:
        if share < INVALID:
            case = fuzz_invalid.broken_call(draw)
            described = case.describe()
            fuzz_invalid.check(case)
            return "invalid"
        if share < INVALID + STATISTICS:
            statistics = fuzz_statistics.random_call(draw)
            described = statistics.describe()
            fuzz_statistics.check(statistics)
            return "statistics"
        call = loss_call(draw)
        described = call.describe()
        check_loss(call)
        return "loss"
    except Exception as error:
        if not isinstance(error, AssertionError):
            error = AssertionError("".join(traceback.format_exception(error)[-3:]))
        raise AssertionError(
            f"{error}\n  call: {described}\n  alone: python -m tests.fuzz --seed {seed} --only {index}"
        ) from None


def failures(seed: int, indices: Sequence[int], kinds: Counter[str] | None = None) -> list[str]:
    """What went wrong in the calls of these numbers."""
    found = []
    for index in indices:
        try:
            kind = check(seed, index)
        except AssertionError as error:
            kind = "failed"
            found.append(str(error))
        if kinds is not None:
            kinds[kind] += 1
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--start", type=int, default=0, help="the first call's number")
    parser.add_argument("--only", type=int, help="run the call of this number alone")
    options = parser.parse_args()
    torch.set_num_threads(2)
    indices = range(options.start, options.start + options.calls) if options.only is None else [options.only]
    kinds: Counter[str] = Counter()
    failed, begun = 0, time.monotonic()
    for index in indices:
        for failure in failures(options.seed, [index], kinds):
            failed += 1
            print(failure, flush=True)
        if index % 5000 == 4999:
            print(f"{index + 1} calls, {failed} failed, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    print(f"{len(indices)} calls, {failed} failed: {', '.join(f'{n} {kind}' for kind, n in kinds.most_common())}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
