"""Teachers that are copies of the student: the moving average of its weights, and what it was some steps before."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastkd import arguments
from fastkd.teachers.mode import NOTHING, TeacherMode, mapped, unwrapped
from fastkd.terms import Need, Outputs, outputs_of

__all__ = ["EMA", "Snapshot"]


class _Copy(TeacherMode):
    """A frozen copy of the student, in eval mode. It is made when it is first needed: of the student as it starts."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: Mapping[str, Any] | None = None  # restored, for a copy that is not there yet

    @property
    def _copy(self) -> nn.Module | None:
        # Not a submodule: checkpoints, `.to()` and `.train()` of what holds this mode are not for it.
        found: nn.Module | None = self.__dict__.get("copy")
        return found

    def check(self, student: nn.Module, needs: Sequence[Need] = (), vocab_size: int | None = None) -> None:
        """The student is no sharded one, and no other than the copy is of."""
        _check_whole(student)
        if self._copy is None:
            self.__dict__["model"] = student  # what terms look at before there is a copy
        elif self.__dict__["followed"] is not unwrapped(student):
            kind = type(self).__name__
            raise ValueError(f"this {kind} follows another student, whose copy would teach: make a {kind} of its own")

    @torch.no_grad()
    def outputs(
        self,
        student: nn.Module,
        inputs: Mapping[str, Any],
        taken: Mapping[str, Any] = NOTHING,
        needs: Sequence[Need] = (),
    ) -> Outputs:
        """One forward of the copy."""
        return outputs_of(self._of(student), inputs, needs)

    def ready(self, student: nn.Module) -> None:
        """Make the copy."""
        self._of(student)

    def _of(self, student: nn.Module) -> nn.Module:
        """The copy."""
        found = self._copy
        if found is None:
            _check_whole(student)
            found = self._made(unwrapped(student)).eval().requires_grad_(False)
            self.__dict__["copy"] = self.__dict__["model"] = found
            self.__dict__["followed"] = unwrapped(student)
            if self._kept is not None:
                self._load(self._kept)
                self._kept = None
        return found

    def _made(self, student: nn.Module) -> nn.Module:
        return copy.deepcopy(student)  # tied weights stay tied

    def kept(self) -> dict[str, Any]:
        """Parameters and buffers of the copy; none before the first batch."""
        if self._kept is not None:
            return dict(self._kept)
        return {"model": {} if self._copy is None else self._copy.state_dict()}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Take up what `kept` gave, now or when the copy is made."""
        if self._copy is not None:
            self._load(kept)
        elif kept["model"]:
            self._kept = kept

    def _load(self, kept: Mapping[str, Any]) -> None:
        assert self._copy is not None
        self._copy.load_state_dict(kept["model"])


class EMA(_Copy):
    """Mean teacher (Tarvainen & Valpola 2017): the exponential moving average of the student's weights teaches it.

    After each optimizer step `average ← d · average + (1 − d) · student`, with `d = min(decay, (1 + n) / (10 + n))` in
    the n-th update, counted from 0: at first the average follows quickly, and forgets the start. Buffers are copied.
    Weights that are tied stay tied. The average is run in eval mode.

    Args:
        decay: in [0, 1).
        warmup: whether d begins at 0.1 as above, or is `decay` from the first step.
        device: where the average is kept and run; None: the student's device. Each batch goes there, and hidden states
            and output head come back; each step the student's weights go there.
        dtype: of the weights that are run, a floating one; None: the student's. An average in 16 bits would not move,
            since its steps are below a rounding. So it is kept in fp32 then, beside the rounded weights that are run.

    `save` writes the average to `ema/`, in fp32 where it is kept so. Raises TypeError or ValueError for wrong
    arguments; `check` for a sharded student, and for another one than it follows.
    """

    def __init__(
        self,
        decay: float = 0.999,
        *,
        warmup: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if arguments.number("decay", decay) >= 1:
            raise ValueError(f"decay must be below 1, got {decay!r}: at 1 the average would stay as it begins")
        arguments.switch("warmup", warmup)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating torch.dtype, got {dtype!r}")
        self.decay, self.warmup = decay, warmup
        self.device = None if device is None else torch.device(device)
        self.dtype = dtype
        self.updates = 0
        self._average: dict[str, Tensor] = {}  # of the weights that are run in 16 bits

    def decay_of(self, update: int) -> float:
        """What of the average stays in an update, counted from 0."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay

    def outputs(
        self,
        student: nn.Module,
        inputs: Mapping[str, Any],
        taken: Mapping[str, Any] = NOTHING,
        needs: Sequence[Need] = (),
    ) -> Outputs:
        """One forward of the average."""
        if self.device is None:
            return super().outputs(student, inputs, taken, needs)
        here, there = next(student.parameters()).device, self.device
        found = super().outputs(student, mapped(inputs, lambda one: one.to(there)), taken, needs)
        logits, fields = (mapped(part, lambda one: one.to(here)) for part in (found.logits, found.fields))
        return replace(found, logits=logits, fields=fields)

    def _made(self, student: nn.Module) -> nn.Module:
        copied = super()._made(student)
        if self.device is not None:
            copied.to(self.device)
        for name, weight in copied.named_parameters():
            dtype = weight.dtype if self.dtype is None else self.dtype
            if weight.is_floating_point() and dtype.itemsize == 2:
                self._average[name] = weight.detach().to(torch.float32, copy=True)
            if weight.is_floating_point():  # not buffers: frequencies of rotary embeddings need their digits
                weight.data = weight.data.to(dtype)
        return copied

    @torch.no_grad()
    def stepped(self, student: nn.Module, step: int, *, epoch_ended: bool = False) -> None:
        """Move the average towards the student."""
        mine = self._of(student)
        share = 1 - self.decay_of(self.updates)
        self.updates += 1
        run = {name: weight for name, weight in mine.named_parameters() if weight.is_floating_point()}
        theirs = dict(unwrapped(student).named_parameters())
        averages = [self._average.get(name, weight) for name, weight in run.items()]
        targets: list[Tensor] = [theirs[name] for name in run]
        pairs = list(zip(averages, targets, strict=True))
        if all(one.dtype == other.dtype and one.device == other.device for one, other in pairs):
            torch._foreach_lerp_(averages, targets, share)
        else:
            for one, other in pairs:  # one at a time, so that few are held twice
                one.lerp_(other.to(one), share)
        for name, average in self._average.items():
            run[name].copy_(average)
        _copy_buffers(mine, unwrapped(student))

    def kept(self) -> dict[str, Any]:
        """Beside the copy: the average where it has more digits, and how many updates it has had."""
        return {"average": dict(self._average), "updates": self.updates} | super().kept()

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Take up what `kept` gave, now or when the copy is made."""
        super().restore(kept)
        self.updates = int(kept["updates"])

    def _load(self, kept: Mapping[str, Any]) -> None:
        super()._load(kept)
        if kept["average"].keys() != self._average.keys():
            raise ValueError("the average was kept in another dtype: resume with the dtype it was begun with")
        for name, average in self._average.items():
            average.copy_(kept["average"][name])

    def save(self, directory: Path) -> None:
        """The average, in Hugging Face format, in `ema/`."""
        model: Any = self._copy
        if model is None:
            return
        run = {name: weight.data for name, weight in model.named_parameters()}
        try:
            # Not as `state_dict`: the configuration that is written says which dtype the model's own weights have.
            for name, average in self._average.items():
                model.get_parameter(name).data = average
            model.save_pretrained(directory / "ema")
        finally:
            for name, rounded in run.items():
                model.get_parameter(name).data = rounded


class Snapshot(_Copy):
    """Snapshot distillation (Yang et al. 2019): the student learns from what it was some steps before.

    With `"epoch"`, from what it was at the last epoch's end: born-again networks (Furlanello et al. 2018) that do not
    start again. Before the first snapshot the student's start teaches. A snapshot is run in eval mode.

    Args:
        every: optimizer steps from one snapshot to the next, at least 1; or `"epoch"`.

    Raises TypeError or ValueError for another `every`; `check` for a sharded student, and for another one than it
    follows; `begin` for a training that ends before the first snapshot teaches.
    """

    def __init__(self, every: int | Literal["epoch"] = "epoch") -> None:
        super().__init__()
        if every != "epoch":
            if isinstance(every, str):
                raise ValueError(f"every must be a number of steps or 'epoch', got {every!r}")
            arguments.integer("every", every, least=1)
        self.every = every

    def begin(self, steps: int, epochs: int) -> None:
        """A snapshot is taken before the last step."""
        if epochs <= 1 if self.every == "epoch" else self.every >= steps:
            when = "at each epoch's end" if self.every == "epoch" else f"every {self.every} steps"
            raise ValueError(
                f"the training has {steps} steps in {epochs} epoch(s), and a snapshot is taken {when}: the student's "
                "own start would teach it to the end. Take them more often, or train longer"
            )

    @torch.no_grad()
    def stepped(self, student: nn.Module, step: int, *, epoch_ended: bool = False) -> None:
        """Take the student where a snapshot is due."""
        mine = self._of(student)
        if epoch_ended if self.every == "epoch" else step % self.every == 0:
            ours = unwrapped(student)
            torch._foreach_copy_(list(mine.parameters()), list(ours.parameters()))
            _copy_buffers(mine, ours)


def _check_whole(student: nn.Module) -> None:
    if any(hasattr(weight, "full_tensor") or weight.is_meta or not weight.numel() for weight in student.parameters()):
        raise ValueError("a copy of the student is to teach it, but its parameters are sharded or offloaded: use DDP")


def _copy_buffers(mine: nn.Module, student: nn.Module) -> None:
    for copied, buffer in zip(mine.buffers(), student.buffers(), strict=True):
        copied.copy_(buffer)
