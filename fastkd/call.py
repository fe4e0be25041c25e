"""The arguments of the loss operators: one list of fields, from which schemas, fakes and implementations are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast, get_type_hints

import torch
from torch import Tensor

from fastkd.divergences import of_spec
from fastkd.rows import RowSpec
from fastkd.sources import Source, Teacher, of_parts, parts

__all__ = ["SCHEMA", "Call", "call_for"]


class Call(NamedTuple):
    """The arguments of the loss operators, tensors first, then a list of tensors.

    A source is the fields that begin with `student` or `teacher`, which `sources.parts` fills and `sources.of_parts`
    reads: logits; or hidden states with weight and bias, beside which `*_head` holds softcap (0: none) and logit scale;
    or the parts of `SparseTargets` or of a `Mixture`. The fields of `RowSpec` are here under their own names. At most
    `live` rows have a scale that is not 0, which matters from hidden states on devices that cannot be asked how many.
    Of a `VocabShard` the fields are its source's, beside `*_cut`, its first column and the vocabulary's size (empty:
    the side is whole), and `*_group`. Then a call without gradients leaves in `row_state` what all ranks know of each
    row, and in `picked` the student's logits of a sparse teacher's tokens. One with gradients reads them, and exchanges
    nothing.
    """

    student: Tensor
    student_weight: Tensor | None
    student_bias: Tensor | None
    teacher: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    teacher_ids: Tensor | None
    teacher_logprobs: Tensor | None
    teacher_rest: Tensor | None
    teacher_entropy: Tensor | None
    labels: Tensor | None
    soft_scale: Tensor | None
    hard_scale: Tensor | None
    row_state: Tensor | None
    picked: Tensor | None
    teacher_mixed: Sequence[Tensor | None]
    student_head: Sequence[float]
    teacher_head: Sequence[float]
    teacher_mixture: Sequence[float]
    student_cut: Sequence[int]
    teacher_cut: Sequence[int]
    student_group: str
    teacher_group: str
    teacher_kind: str
    divergence: str
    parameters: Sequence[float]
    temperature: float
    teacher_temperature: float
    soft_weight: float
    hard_weight: float
    vocab_size: int
    autocast: torch.dtype | None
    memory_budget: int | None
    live: int | torch.SymInt | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Every argument that is a tensor, with those of the list."""
        return (*cast("tuple[Tensor | None, ...]", self[: len(_TENSORS)]), *self.teacher_mixed)

    @property
    def numbers(self) -> tuple[Any, ...]:
        """The other arguments."""
        return self[len(_TENSORS) + 1 :]

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None], numbers: Sequence[Any]) -> Call:
        """The call with these `tensors` and `numbers`."""
        given: tuple[Any, ...] = (*tensors[: len(_TENSORS)], list(tensors[len(_TENSORS) :]), *numbers)
        return cls(*given)

    @property
    def spec(self) -> RowSpec:
        return RowSpec._make(cast("tuple[Any, ...]", self[_SPEC]))

    @property
    def on_logits(self) -> bool:
        """Whether each side is there as it is: neither is a projection or a mixture, which is made chunk by chunk."""
        return self.student_weight is None and self.teacher_weight is None and not self.teacher_mixed

    def split(self) -> tuple[Call | None, Call]:
        """A term of weight 0 that could spoil the gradient of the other, or None, and the call without it.

        Cross-entropy beside a divergence with a softmax cannot: it is NaN where that is, and where a label is no token,
        which raises or, on a GPU, counts for nothing at weight 0.
        """
        if self.soft_scale is not None and self.soft_weight == 0:
            return self._without(_HARD), self._without(_SOFT)
        if (
            self.hard_scale is not None
            and self.hard_weight == 0
            and not of_spec(self.divergence, self.parameters).tempered
        ):
            return self._without(_SOFT), self._without(_HARD)
        return None, self

    def _without(self, term: tuple[str, ...]) -> Call:
        return self._replace(**{name: _ABSENT[name] for name in term})

    def student_source(self) -> Source:
        source = of_parts("student", self)
        assert isinstance(source, Source)
        return source

    def teacher_source(self) -> Teacher | None:
        return of_parts("teacher", self)


#: Type of a field → its type in an operator's schema, and its value in a call that lacks it.
_TYPES: dict[Any, tuple[str, Any]] = {
    Tensor: ("Tensor", None),
    Tensor | None: ("Tensor?", None),
    Sequence[Tensor | None]: ("Tensor?[]", []),
    Sequence[float]: ("float[]", []),
    Sequence[int]: ("int[]", []),
    str: ("str", ""),
    float: ("float", 0.0),
    int: ("int", 0),
    int | None: ("int?", None),
    int | torch.SymInt | None: ("SymInt?", None),  # another number of tokens is no reason to compile again
    torch.dtype | None: ("ScalarType?", None),
}
_FIELDS = {name: _TYPES[kind] for name, kind in get_type_hints(Call).items()}
_ABSENT = {name: absent for name, (_, absent) in _FIELDS.items()}
_TENSORS = [name for name, (kind, _) in _FIELDS.items() if kind in ("Tensor", "Tensor?")]
_SPEC = slice(Call._fields.index(RowSpec._fields[0]), Call._fields.index(RowSpec._fields[-1]) + 1)
assert list(Call._fields[_SPEC]) == list(RowSpec._fields), "the fields of RowSpec stand together in Call, in its order"
assert Call._fields[: len(_TENSORS) + 1] == (*_TENSORS, "teacher_mixed"), "tensors come first, then the list of them"

#: What follows `Tensor student` in a schema: the other fields, in their order.
SCHEMA = ", ".join(f"{kind} {name}" for name, (kind, _) in _FIELDS.items() if name != "student")

#: The fields that only one of the two terms reads.
_SOFT = (*(name for name in _FIELDS if name.startswith("teacher") and name not in RowSpec._fields), "soft_scale")
_HARD = ("labels", "hard_scale")


def call_for(
    student: Source,
    teacher: Teacher | None,
    labels: Tensor | None,
    soft_scale: Tensor | None,
    hard_scale: Tensor | None,
    spec: RowSpec,
    autocast: torch.dtype | None = None,
    memory_budget: int | None = None,
    live: int | torch.SymInt | None = None,
) -> Call:
    """The arguments for these sources; labels and scales are `[rows]`."""
    given = {
        **_ABSENT,
        **parts("student", student),
        **parts("teacher", teacher),
        **spec._asdict(),
        "labels": labels,
        "soft_scale": soft_scale,
        "hard_scale": hard_scale,
        "autocast": autocast,
        "memory_budget": memory_budget,
        "live": live,
    }
    return Call(**given)
