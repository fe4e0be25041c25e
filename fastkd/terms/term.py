"""Terms: the addends of a distillation's training loss. A term is one class.

    class ZLoss(Term):
        '''Keeps the normalisers of the student's rows near 1: mean of log²(Σ exp z).'''

        def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
            logits = student.projection.hidden @ student.projection.weight.T
            return batch.mean(logits.logsumexp(-1).square())

    trainer = KDTrainer(student, arguments, teacher=teacher, terms=[ZLoss("z_loss", weight=1e-4)], ...)

The trainer adds weight · value to the loss, logs the value under the term's name, trains the term's parameters with the
student's, and keeps them in checkpoints. A term needs no trainer: in a loop of one's own it is called with what
`fastkd.terms.outputs_of(model, inputs, needs)` gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastkd import arguments
from fastkd.projection.models import project
from fastkd.sources import Projection, Teacher
from fastkd.terms.architecture import Architecture
from fastkd.terms.recording import Heads, recorded
from fastkd.terms.routed import RoutedLogits

__all__ = ["Batch", "Course", "Need", "Needs", "Outputs", "Shape", "Term", "Terms", "outputs_of"]

#: The label of what is not to be learnt.
IGNORED = -100
#: What a model can be asked for beside its last hidden states; also the name of the field of its outputs.
Need = Literal["hidden_states", "attentions", "projections"]
Shape = Literal["constant", "linear", "cosine"]
#: What a trainer logs itself, beside what begins with `eval_`.
RESERVED = (
    *("loss", "soft", "hard", "ratio", "temperature", "soft_weight", "tokens_per_second"),
    *("learning_rate", "grad_norm", "epoch", "step", "total_flos", "num_input_tokens_seen"),
)
#: What teachers that learn are logged as.
TEACHERS = ("teacher_loss", "peer_loss")


@dataclass(frozen=True)
class Course:
    """A value over the course of training: from `start` at the first step to `end` after the last.

    Raises ValueError for an unknown shape.
    """

    start: float
    end: float
    shape: Shape

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            raise ValueError(f"the shape of a course must be one of {', '.join(get_args(Shape))}, got {self.shape!r}")

    def at(self, progress: float) -> float:
        """The value when a share of the training, in [0, 1], is done."""
        if self.shape == "constant":
            return self.start
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True)
class Outputs:
    """What one model says of one batch."""

    #: Last hidden states `[batch, tokens, H]` with the output head; logits; or what a cache has kept of a teacher. Of
    #: several teachers, each with its rows, those. None where nobody asked.
    logits: Teacher | RoutedLogits | None
    #: The model's own outputs, without its logits: `hidden_states`, `attentions`, `aux_loss`, ... Empty for a cache.
    fields: Mapping[str, Any] = field(default_factory=dict)
    #: The model itself, for terms that look into it; None for a cache.
    model: nn.Module | None = None

    @property
    def projection(self) -> Projection:
        """`logits`, where they are of a live model. TypeError for others."""
        if not isinstance(self.logits, Projection):
            raise TypeError(f"a live model is needed, but the batch brings {type(self.logits).__name__}")
        return self.logits

    @property
    def hidden_states(self) -> tuple[Tensor, ...]:
        """`[batch, tokens, H]` each: the embedding's, then those after each block. ValueError where there are none.

        None in the place of what no term reads.
        """
        found: tuple[Tensor, ...] = self._found("hidden_states")
        return found

    @property
    def attentions(self) -> tuple[Tensor, ...]:
        """Probabilities `[batch, heads, queries, keys]` of each block. ValueError where there are none."""
        found: tuple[Tensor, ...] = self._found("attentions")
        if any(one is None for one in found):
            raise ValueError(_NO_ATTENTIONS)
        return found

    @property
    def projections(self) -> Mapping[int, Heads]:
        """Queries, keys and values of each block, by its number. ValueError where there are none."""
        found: Mapping[int, Heads] = self._found("projections")
        return found

    def _found(self, name: str) -> Any:
        found = self.fields.get(name)
        if found is None or (name == "attentions" and not len(found)):
            if name == "attentions" and self.model is not None:
                raise ValueError(_NO_ATTENTIONS)
            whose = (
                "the batch, whose predictions come from a cache" if self.model is None else type(self.model).__name__
            )
            raise ValueError(f"{whose} has no {name}: a term that needs them says so in `needs`, and needs live models")
        return found


_NO_ATTENTIONS = (
    "the model returns no attentions: its attention implementation is fused. Load it with attn_implementation='eager'"
)


class Needs(tuple[Need, ...]):
    """What terms need of a model and, if not all blocks are read, which."""

    blocks: Mapping[Need, frozenset[int]]

    def __new__(cls, names: Sequence[Need], blocks: Mapping[Need, frozenset[int]]) -> Needs:
        """A tuple of names."""
        made = super().__new__(cls, names)
        made.blocks = blocks
        return made


def outputs_of(model: nn.Module, inputs: Mapping[str, Any], needs: Sequence[Need] = ()) -> Outputs:
    """One forward of a causal language model, with what terms need beside its last hidden states.

    Args:
        model, inputs: as `fastkd.project` takes them, which says what it raises.
        needs: `terms.needs` of any model. `terms.students_needs` and `terms.teachers_needs` keep nothing of the blocks
            that no term reads.
    """
    blocks: Mapping[Need, frozenset[int]] = needs.blocks if isinstance(needs, Needs) else {}
    asked: dict[str, Any] = {f"output_{need}": True for need in needs if need != "projections"}
    if "hidden_states" in blocks:
        asked["output_hidden_states"] = [block + 1 for block in sorted(blocks["hidden_states"])]
    with recorded(model, blocks.get("projections")) if "projections" in needs else nullcontext() as heads:
        logits, fields = project(model, return_outputs=True, **{**inputs, **asked})
    return Outputs(logits, fields if heads is None else {**fields, "projections": heads}, model)


@dataclass(frozen=True)
class Batch:
    """One batch, beside what the models say of it.

    A position counts for terms if its next label does and it is no padding itself: the last padding before a row's text
    would predict the first token. `KDTerm`, and Trainer's count of a step's tokens, go by labels alone, so padding on
    the left counts there unless the first label of the text is −100.
    """

    #: int64 `[batch, tokens]`; −100 is not to be learnt. Each at its own token, but where `shifted`.
    labels: Tensor
    #: What the models were given: `input_ids`, `attention_mask`, ...
    inputs: dict[str, Any]
    #: Predicted tokens of the whole optimizer step, of all devices and accumulated batches. None: those of this batch.
    num_items: Tensor | float | None = None
    #: How many tokens of this batch count, where the host knows it.
    live: int | None = None
    #: Whether labels are at the positions that predict them, as `fastkd.next_token_labels` moves them.
    shifted: bool = False

    def mean(self, values: Tensor) -> Tensor:
        """The batch's part of the step's mean over predicted tokens: a scalar.

        `values` `[batch, tokens]` are of the positions that predict, see `counted`.
        The parts of all batches of an optimizer step add up to its mean, as the distillation loss' parts do.
        """
        found = torch.where(self.counted, values, 0.0).sum()
        return self.over_step(found)

    def part(self, value: Tensor) -> Tensor:
        """The same of a mean over this batch, a scalar: `value` times the batch's share of the step's tokens."""
        return value * self.over_step(self.counted.sum())

    @property
    def predicted(self) -> Tensor:
        """The labels of what some position predicts: `[batch, tokens − 1]`, or all where they are `shifted`."""
        return self.labels if self.shifted else self.labels[:, 1:]

    @property
    def counted(self) -> Tensor:
        """Bool `[batch, tokens]`: the positions whose next label counts, and which `attention_mask` has."""
        learnt, mask = self.predicted != IGNORED, self.inputs.get("attention_mask")
        learnt = learnt if self.shifted else nn.functional.pad(learnt, (0, 1))
        if not isinstance(mask, Tensor) or mask.shape != self.labels.shape:
            return learnt
        return learnt & (mask != 0).to(learnt.device)

    @property
    def items(self) -> Tensor | float:
        """The predicted tokens of the step, to divide by: at least 1."""
        if self.num_items is None:
            return self.counted.sum().clamp(min=1)
        return self.num_items.clamp(min=1) if isinstance(self.num_items, Tensor) else max(self.num_items, 1)

    def over_step(self, found: Tensor) -> Tensor:
        """The same of a sum over the tokens of this batch that count: `found` by the number of those of the step."""
        return found / self.items


class Term(nn.Module):
    """An addend of the training loss: weight · `forward(student, teacher, batch)`. Subclass it and define `forward`.

    Args:
        name: what the value is logged as, of this term alone.
        weight: factor of the value in the loss, at least 0; at 0 the value is only logged. It may be changed between
            steps; a resumed run does not restore what was changed by hand. A `Course`: the trainer changes it, from its
            start to its end.

    Parameters and buffers of a term are its own: a module of the student may not be one of it.

    Raises ValueError for a name that the trainer or a teacher is logged under, and for a weight that is negative or no
    finite number, also where it is set later.
    """

    #: What `forward` reads of both models' outputs, beside the logits.
    needs: tuple[Need, ...] = ()
    #: The blocks of which `needs` are read, if not all: of others nothing is kept.
    students_blocks: frozenset[int] | None = None
    teachers_blocks: frozenset[int] | None = None
    #: Names of the files that `save` writes, which no other term of a trainer may write.
    files: tuple[str, ...] = ()

    @property
    def needs_teacher(self) -> bool:
        """Whether `forward` reads anything of the teacher, which is not run for terms that do not."""
        return bool(self.needs)

    def __init__(self, name: str, weight: float | Course = 1.0) -> None:
        super().__init__()
        if not isinstance(name, str):
            raise TypeError(f"a term's name must be a str, got {name!r}")
        if not name or name in (*RESERVED, *TEACHERS) or name.startswith("eval_"):
            taken = ", ".join((*RESERVED, *TEACHERS))
            raise ValueError(f"a term cannot be named {name!r}: the trainer logs {taken} and eval_… itself")
        self.name = name
        self.course = weight if isinstance(weight, Course) else None
        if isinstance(weight, Course):
            arguments.number(f"the end of the weight of term {name!r}", weight.end)
        self.weight = weight.start if isinstance(weight, Course) else weight

    @property
    def weight(self) -> float:
        """Factor of the value in the loss."""
        return self._weight

    @weight.setter
    def weight(self, value: float) -> None:
        self._weight = arguments.number(f"the weight of term {self.name!r}", value)

    def follow(self, progress: float) -> None:
        """Set what changes over the training, of which a share in [0, 1] is done."""
        if self.course is not None:
            self.weight = self.course.at(progress)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor | dict[str, Tensor]:
        """A scalar, differentiable in what the term is to change. `batch.mean` makes one of a value per token.

        It is this batch's part of the step's value: where gradients are accumulated, values of several batches are
        added. Or a dict with the scalar under `"loss"`, and beside it scalars that are only logged, by their names.
        `teacher.logits` is None where no term asks for predictions. Raise ValueError where what is needed is missing.
        """
        raise NotImplementedError

    def check(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Raise ValueError for models it cannot serve; make the parameters whose shapes are the models'.

        Called once, before the optimizer is made. `teacher` is None for a cache.
        """

    def save(self, directory: Path) -> None:
        """Write `files`: what a run leaves of it beside the student, such as heads of its own. By default nothing."""

    def blocks_read(self, student: Architecture, teacher: Architecture) -> frozenset[int] | None:
        """The blocks of the teacher whose `needs` are read, of such models; None: all."""
        return self.teachers_blocks

    def gradient_bytes(
        self, student: Architecture, teacher: Architecture, batch: int, tokens: int, dtype: torch.dtype
    ) -> int:
        """What a term keeps from its forward to the backward, beside the models' outputs, which are of `dtype`."""
        return 0


class Terms(nn.ModuleList):
    """The terms of one trainer. Calling it gives Σ weight · value of a batch, and sums up the values for the logs.

    Raises TypeError for what is no Term, ValueError for two of one name or that save one file, and for a term with a
    module of the student.
    """

    def __init__(self, terms: Sequence[Term], student: nn.Module | None = None) -> None:
        wrong = next((term for term in terms if not isinstance(term, Term)), None)
        if wrong is not None:
            raise TypeError(f"terms must be of fastkd.terms.Term, got {type(wrong).__name__}")
        names = [term.name for term in terms]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two terms are named {', '.join(twice)}: give one another `name`, to be logged as")
        writers: dict[str, str] = {}
        for term in terms:
            for file in term.files:
                first = writers.setdefault(file, term.name)
                if first != term.name:
                    raise ValueError(f"terms {first!r} and {term.name!r} would overwrite each other's {file}: keep one")
        students = {id(weight) for weight in student.parameters()} if student is not None else set()
        for term in terms:
            if any(id(weight) in students for weight in term.parameters()):
                raise ValueError(f"term {term.name!r} holds parameters of the student, which would be trained twice")
        super().__init__(terms)
        self._terms = tuple(terms)
        self.calls = 0
        self._sums: Tensor | None = None
        self._logged: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The names, in order."""
        return [term.name for term in self._terms]

    @property
    def needs(self) -> tuple[Need, ...]:
        """What some term needs of the models' outputs."""
        return tuple(dict.fromkeys(need for term in self._terms for need in term.needs))

    @property
    def students_needs(self) -> Needs:
        """The same of the student: without the blocks that no term reads, once `check` has been called."""
        return self._without_idle(lambda term: term.students_blocks)

    @property
    def teachers_needs(self) -> Needs:
        """The same of the teacher."""
        return self._without_idle(lambda term: term.teachers_blocks)

    def _without_idle(self, blocks_of: Callable[[Term], frozenset[int] | None]) -> Needs:
        found: dict[Need, frozenset[int]] = {}
        for need in self.needs:
            read = [blocks_of(term) for term in self._terms if need in term.needs]
            known = [blocks for blocks in read if blocks is not None]
            if len(known) == len(read):
                found[need] = frozenset().union(*known)
        return Needs(self.needs, found)

    @property
    def need_teacher(self) -> bool:
        """Whether some term reads anything of the teacher."""
        return any(term.needs_teacher for term in self._terms)

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that require gradients."""
        return [weight for weight in self.parameters() if weight.requires_grad]

    def follow(self, progress: float) -> None:
        """Set what changes over the training, of which a share in [0, 1] is done."""
        for term in self._terms:
            term.follow(progress)

    def check(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Let each term look at the models, before the optimizer is made. ValueError where one cannot serve them."""
        for term in self._terms:
            term.check(student, teacher)

    def save(self, directory: Path) -> None:
        """Let each term write what a run leaves of it."""
        for term in self._terms:
            term.save(directory)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Scalar. Raises TypeError or ValueError, by the term's name, for a value that is none or changes nothing."""
        self.calls += 1
        logged: dict[str, Tensor] = {}
        losses = []
        for term in self._terms:
            value, shown = _value(term, term(student, teacher, batch))
            twice = sorted(logged.keys() & shown.keys())
            if twice:
                raise ValueError(f"two terms log {', '.join(twice)}, term {term.name!r} the second one: rename one")
            logged |= shown
            if term.weight:
                losses.append(term.weight * value)
        sums = torch.stack([value.detach().float() for value in logged.values()])
        self._sums = sums if self._sums is None else self._sums + sums
        self._logged = tuple(logged)
        return sum(losses, torch.zeros_like(sums[0]))

    def take_sums(self) -> dict[str, Tensor]:
        """Name → the values added up since the last time; nothing where there are none."""
        sums, self._sums = self._sums, None
        return {} if sums is None else dict(zip(self._logged, sums, strict=True))

    def kept(self) -> dict[str, Any]:
        """Name → state of each term that has any, for a checkpoint."""
        return {term.name: state for term in self._terms if (state := term.state_dict())}

    def restore(self, kept: dict[str, Any], where: str) -> None:
        """What `kept` gave. Raises ValueError, which quotes `where`, for other terms."""
        ours = self.kept()
        if ours.keys() != kept.keys():
            raise ValueError(f"{where} has parameters of the terms {sorted(kept)}, but the trainer has {sorted(ours)}")
        for term in self._terms:
            if term.name in kept:
                term.load_state_dict(kept[term.name])


def _value(term: Term, found: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """(what is to be differentiated, what is to be logged)."""
    if isinstance(found, Mapping):
        if "loss" not in found:
            raise TypeError(f"term {term.name!r} must return its value under 'loss', got {sorted(found)}")
        value, shown = found["loss"], {name: one for name, one in found.items() if name != "loss"}
    else:
        value, shown = found, {term.name: found}
    for one in (value, *shown.values()):
        if not isinstance(one, Tensor) or one.dim() != 0:
            got = f"a tensor {tuple(one.shape)}" if isinstance(one, Tensor) else f"a {type(one).__name__}"
            raise TypeError(f"term {term.name!r} must return a scalar tensor, got {got}; batch.mean makes one")
    if term.weight and torch.is_grad_enabled() and not value.requires_grad:
        raise ValueError(
            f"term {term.name!r} has weight {term.weight}, but its value has no gradient, so it would change nothing: "
            "compute it from the student's outputs with differentiable operations, or give it weight 0 to log it"
        )
    return value, shown
