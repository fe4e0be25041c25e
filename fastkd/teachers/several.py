"""Several frozen teachers: their probabilities averaged, or each with rows of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import arguments
from fastkd.mixture import Mixture
from fastkd.projected import Projection
from fastkd.teachers.given import check_frozen
from fastkd.teachers.mode import NOTHING, TeacherMode, check_models
from fastkd.terms import Need, Outputs, RoutedLogits, outputs_of

__all__ = ["Mixed", "Routed"]


class _Several(TeacherMode):
    """Models that are not trained."""

    def __init__(self, models: Mapping[str, nn.Module] | Sequence[nn.Module]) -> None:
        super().__init__()
        named = models.items() if isinstance(models, Mapping) else enumerate(models)
        found: dict[Any, nn.Module] = dict(named)
        if not found:
            raise ValueError("there are no teachers: pass some models")
        for name, model in found.items():
            check_frozen(f"teacher {name!r}", model)
        # Not submodules: checkpoints, `.to()` and `.train()` of what holds this mode are not for them.
        self.__dict__["models"] = found

    @property
    def _models(self) -> dict[Any, nn.Module]:
        found: dict[Any, nn.Module] = self.__dict__["models"]
        return found

    def check(self, student: nn.Module, needs: Sequence[Need] = (), vocab_size: int | None = None) -> None:
        """All models have one vocabulary, and none is the student. ValueError for needs: features are of one model."""
        if needs:
            raise ValueError(
                f"terms need the teacher's {' and '.join(needs)}, but there are {len(self._models)} teachers, so it "
                "is not clear whose features are meant: take one teacher, or those terms away"
            )
        check_models(student, {f"teacher {name!r}": model for name, model in self._models.items()}, vocab_size)


class Mixed(_Several):
    """An ensemble: the average of several teachers' probabilities, at the loss's temperature (Hinton et al. 2015).

    Args:
        models: each frozen, in eval mode, on the student's device, with the student's vocabulary; or names and models.
        weights: one of each model, at least 0, not all 0: their shares. None: equal.

    The predictions are a `fastkd.Mixture`, for any divergence with a softmax: each row of each teacher is read once,
    and no probabilities are formed. A teacher of weight 0 is not run.

    Raises ValueError where there are no models, for one that is trainable or in training mode, and for weights that are
    not as above; `check` for a model that is the student or has another vocabulary, and for terms that need hidden
    states or attentions; `check_loss` for `mse`, which needs logits.
    """

    kind = "mixture"

    def __init__(
        self, models: Mapping[str, nn.Module] | Sequence[nn.Module], weights: Sequence[float] | None = None
    ) -> None:
        super().__init__(models)
        given = [1.0] * len(self._models) if weights is None else list(weights)
        if len(given) != len(self._models):
            raise ValueError(f"there are {len(given)} weights for {len(self._models)} teachers")
        for number, weight in enumerate(given):
            arguments.number(f"weights[{number}]", weight)
        if not sum(given):
            raise ValueError(f"all weights are 0: {given}")
        self.weights = [weight / sum(given) for weight in given]
        self._vocab_size: int | None = None

    @property
    def in_step(self) -> list[nn.Module]:
        """Those that are run."""
        return [model for model, weight in zip(self._models.values(), self.weights, strict=True) if weight]

    def check(self, student: nn.Module, needs: Sequence[Need] = (), vocab_size: int | None = None) -> None:
        """As above. Of heads that are padded to different widths the first `vocab_size` columns are mixed."""
        super().check(student, needs, vocab_size)
        self._vocab_size = vocab_size

    @torch.no_grad()
    def outputs(
        self,
        student: nn.Module,
        inputs: Mapping[str, Any],
        taken: Mapping[str, Any] = NOTHING,
        needs: Sequence[Need] = (),
    ) -> Outputs:
        """One forward of each teacher."""
        pairs = [pair for pair in zip(self._models.values(), self.weights, strict=True) if pair[1]]
        heads = [self._counted(outputs_of(model, inputs).projection) for model, _ in pairs]
        return Outputs(Mixture(heads, [weight for _, weight in pairs]))

    def _counted(self, logits: Projection) -> Projection:
        """The columns that count."""
        bias = None if logits.bias is None else logits.bias[: self._vocab_size]
        return replace(logits, weight=logits.weight[: self._vocab_size], bias=bias)


class Routed(_Several):
    """A column of the batch names the teacher of each row. A teacher runs on its rows alone.

    Args:
        models: names and models, or models, whose names are then their indices from 0. Each frozen, in eval mode, on
            the student's device, with the student's vocabulary.
        column: the key of the batch that has the names of its rows: a list of strings, or indices as a list or as
            integers `[batch]`, on the CPU best, since they are read there. Indices count the models in the order given,
            unless names are numbers: a name goes before an index.

    Tensors among the inputs whose first dimension is the batch are cut into rows. Others go to each teacher as they
    are.

    Raises ValueError where there are no models, for one that is trainable or in training mode, and, when a batch comes,
    for a column that is missing or has another length, and for names that no model has; `check` for a model that is the
    student or has another vocabulary, and for terms that need hidden states or attentions.
    """

    def __init__(self, models: Mapping[str, nn.Module] | Sequence[nn.Module], column: str = "teacher_name") -> None:
        super().__init__(models)
        self.columns = (column,)

    @torch.no_grad()
    def outputs(
        self,
        student: nn.Module,
        inputs: Mapping[str, Any],
        taken: Mapping[str, Any] = NOTHING,
        needs: Sequence[Need] = (),
    ) -> Outputs:
        """One forward of each teacher that has rows."""
        tensors = [one for one in inputs.values() if isinstance(one, Tensor)]
        count = tensors[0].shape[0]
        rows_of: dict[int, list[int]] = {}
        for row, number in enumerate(self._numbers(taken, count)):
            rows_of.setdefault(number, []).append(row)
        models, parts = list(self._models.values()), []
        for number, rows in sorted(rows_of.items()):
            index = torch.tensor(rows, dtype=torch.int64, device=tensors[0].device)
            some = {
                name: one.index_select(0, index) if isinstance(one, Tensor) and one.shape[:1] == (count,) else one
                for name, one in inputs.items()
            }
            parts.append((index, outputs_of(models[number], some).projection))
        return Outputs(RoutedLogits(parts))

    def _numbers(self, taken: Mapping[str, Any], count: int) -> list[int]:
        """Which teacher each row has."""
        (column,), known = self.columns, list(self._models)
        found = taken.get(column)
        if found is None:
            raise ValueError(f"the batch has no {column!r}, which names the teacher of each row: there are {known}")
        names = found.tolist() if isinstance(found, Tensor) else list(found)
        if len(names) != count:
            raise ValueError(f"{column!r} has {len(names)} teachers for a batch of {count} rows")
        numbers = {number: number for number in range(len(known))} | {name: number for number, name in enumerate(known)}
        strange = next((name for name in names if not isinstance(name, (str, int)) or name not in numbers), None)
        if strange is not None:
            raise ValueError(f"{column!r} names the teacher {strange!r}, which is not there: there are {known}")
        return [numbers[name] for name in names]
