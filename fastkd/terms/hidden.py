"""`HiddenStateTerm`: the student's hidden states are to be the teacher's, block by block."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastkd import arguments
from fastkd.rows import kept_dtype
from fastkd.terms.architecture import Architecture, architecture_of
from fastkd.terms.layers import LayerMap, LearnedLayers, check_layers, is_learned, layer_pairs
from fastkd.terms.rows_apart import DISTANCES, Comparison, distance
from fastkd.terms.term import Batch, Course, Need, Outputs, Term

__all__ = ["HiddenStateTerm", "Projector", "computed_rows", "same_batch"]

Projector = Literal["linear", "none"]
_HOSTS = {"cpu"}  # devices whose values can be looked at without waiting
_COOLING = Course(1.0, 0.1, "linear")


class HiddenStateTerm(Term):
    """How far the student's hidden states are from the teacher's (FitNets, Romero et al. 2015; TinyBERT, Jiao et al.
    2020), after the blocks that a map pairs.

    Of a pair, with the student's row x and the teacher's y of one token, a projector W and H_t the teacher's width:

        p = x Wᵀ, or x where the widths are equal
        p̂ = p / √(mean p² + 1e-12), ŷ = y / √(mean y² + 1e-12), with `normalise`; else p̂ = p and ŷ = y
        mse: mean over H_t of (p̂ − ŷ)²      smooth_l1: of Huber's function of p̂ − ŷ, δ = 1
        cosine: mean over H_t of (p̂ − ŷ)² / 2, which is 1 − cos(p, y)

    The value is the mean over pairs, and over the positions whose next label counts, as in the distillation loss. The
    other rows are not computed, on the CPU and where the number of tokens that count is known (`Batch.live`).
    Normalised mse is the loss of PKD (Sun et al. 2019), the squared distance of rows of length 1.

        terms = Terms([KDTerm(), HiddenStateTerm("uniform", weight=0.5)])
        terms.check(student, teacher)  # makes the projectors, so before the optimizer

    Args:
        layers: which block learns from which. `"uniform"`: block i of s from round(i · t / s) of t. `"last"`,
            `"last:4"`: the last blocks of both. Pairs [[student's, teacher's], ...], counted from 0, without the
            embedding: the output of block i is `hidden_states[i + 1]`, and that of the last one comes after the model's
            last norm. `"learned"`: each block of the student from a mixture of all of the teacher's, whose shares are
            a softmax that is trained with the student.
        projector: `"linear"`: a matrix without bias per pair where the widths differ. `"none"`: widths must be equal.
        normalise: divide each row by its root mean square. Cosine does in any case.
        loss: `"mse"`, `"cosine"` or `"smooth_l1"`.
        weight, name: as of `Term`.
        temperature: of the learned map's softmax; a `Course` changes it over the training. None: from 1 to 0.1,
            linearly. ValueError beside another map.

    Projectors and shares are float64 for a float64 student, else fp32. Products accumulate in fp32 and rows are
    computed a chunk at a time: nothing of `[tokens, H_t]` is kept beside the models' own outputs. Between forward and
    backward there is the gradient of the student's hidden states.

    Raises TypeError or ValueError for other values. `check` raises ValueError for blocks that do not exist, unequal
    widths without a projector and a teacher that has no hidden states; `forward` for unequal batches or sequences.
    """

    needs: tuple[Need, ...] = ("hidden_states",)

    def __init__(
        self,
        layers: LayerMap = "uniform",
        projector: Projector = "linear",
        normalise: bool = True,
        loss: Literal["mse", "cosine", "smooth_l1"] = "mse",
        *,
        weight: float | Course = 1.0,
        temperature: float | Course | None = None,
        name: str = "hidden",
    ) -> None:
        super().__init__(name, weight)
        check_layers(layers)
        if projector not in ("linear", "none"):
            raise ValueError(f"projector must be 'linear' or 'none', got {projector!r}")
        if loss not in DISTANCES:
            raise ValueError(f"loss must be one of {', '.join(DISTANCES)}, got {loss!r}")
        if loss == "cosine" and not arguments.switch("normalise", normalise):
            raise ValueError("loss='cosine' normalises: it has no form with normalise=False")
        self.layers, self.projector = layers, projector
        self.how = Comparison(loss, arguments.switch("normalise", normalise))
        if temperature is None:
            temperature = _COOLING
        elif not is_learned(layers):
            raise ValueError(f"temperature={temperature} is of layers='learned' alone, but layers={layers!r}")
        self._cooling = temperature if isinstance(temperature, Course) else Course(temperature, temperature, "constant")
        for value in (self._cooling.start, self._cooling.end):
            arguments.temperature("temperature", value)
        self.temperature = self._cooling.start
        #: (block of the student, those of the teacher) of each pair; set by `check`.
        self.pairs: list[tuple[int, tuple[int, ...]]] = []
        self.projectors = nn.ModuleList()
        self.learned: LearnedLayers | None = None
        self._made: tuple[int, ...] = ()

    def follow(self, progress: float) -> None:
        """Set weight and temperature."""
        super().follow(progress)
        self.temperature = self._cooling.at(progress)

    def check(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Raise ValueError for models it cannot serve; make the projectors and the learned map, once."""
        if teacher is None:
            raise ValueError(f"term {self.name!r} reads the teacher's hidden states, which no cache has: take a model")
        ours, theirs = architecture_of(student), architecture_of(teacher)
        if self.projector == "none" and ours.width != theirs.width:
            raise ValueError(
                f"term {self.name!r} has projector='none', but the student's hidden states are {ours.width} wide and "
                f"the teacher's {theirs.width}: take projector='linear'"
            )
        pairs = self._pairs(ours, theirs)
        made = (ours.blocks, ours.width, theirs.blocks, theirs.width)
        if self._made and self._made != made:
            raise ValueError(f"term {self.name!r} was made for other models, of other numbers of blocks or widths")
        if not self._made:
            self._make(ours, theirs, len(pairs), next(student.parameters()))
        self.pairs, self._made = pairs, made
        self.students_blocks = frozenset(block for block, _ in pairs)
        self.teachers_blocks = self.blocks_read(ours, theirs)

    def _pairs(self, ours: Architecture, theirs: Architecture) -> list[tuple[int, tuple[int, ...]]]:
        if is_learned(self.layers):
            return [(block, tuple(range(theirs.blocks))) for block in range(ours.blocks)]
        return [(block, (other,)) for block, other in layer_pairs(self.layers, ours.blocks, theirs.blocks)]

    def blocks_read(self, student: Architecture, teacher: Architecture) -> frozenset[int]:
        """Those of the pairs."""
        return frozenset(other for _, others in self._pairs(student, teacher) for other in others)

    def gradient_bytes(
        self, student: Architecture, teacher: Architecture, batch: int, tokens: int, dtype: torch.dtype
    ) -> int:
        """Gradients of the student's hidden states and of the projectors, of each pair."""
        projector = student.width * teacher.width * 4 if student.width != teacher.width else 0
        states = batch * tokens * student.width * kept_dtype(dtype).itemsize
        return len(self._pairs(student, teacher)) * (states + projector)

    def _make(self, ours: Architecture, theirs: Architecture, pairs: int, like: Tensor) -> None:
        if ours.width != theirs.width:
            self.projectors.extend(nn.Linear(ours.width, theirs.width, bias=False) for _ in range(pairs))
        if is_learned(self.layers):
            self.learned = LearnedLayers(ours.blocks, theirs.blocks)
        self.to(like.device, torch.float64 if like.dtype == torch.float64 else torch.float32)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The mean over pairs and tokens."""
        if not self.pairs:
            raise ValueError(
                f"term {self.name!r} knows no models yet: call check(student, teacher) before the optimizer"
            )
        ours, theirs = student.hidden_states, teacher.hidden_states
        first, (other, *_) = self.pairs[0]
        x, y = ours[first + 1], theirs[other + 1]
        same_batch(self.name, "hidden states", x.shape[:2], y.shape[:2], batch)
        rows, counted = computed_rows(batch, x.device)
        shares = self.learned.shares(self.temperature) if self.learned is not None else None
        total: Any = 0.0
        for number, (block, others) in enumerate(self.pairs):
            total = total + distance(
                ours[block + 1],
                [theirs[other + 1] for other in others],
                rows,
                counted,
                self.how,
                self.projectors[number].weight if self.projectors else None,  # type: ignore[arg-type]
                None if shares is None else shares[number],
            )
        return batch.over_step(total / len(self.pairs))


def same_batch(name: str, what: str, ours: torch.Size, theirs: torch.Size, batch: Batch) -> None:
    """Raise ValueError where student, teacher and labels are not of the same `[batch, tokens]`."""
    if ours != theirs:
        raise ValueError(
            f"term {name!r}: the student's {what} are of {tuple(ours)} (batch, tokens), the teacher's of "
            f"{tuple(theirs)}: both need the same batch"
        )
    if ours != batch.labels.shape:
        raise ValueError(
            f"term {name!r}: labels are {tuple(batch.labels.shape)}, but {what} are of {tuple(ours)} (batch, tokens)"
        )


def computed_rows(batch: Batch, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """The numbers of the rows to compute, of batch · tokens, and bool `[batch · tokens]`: those that count.

    On a GPU looking which rows count would make the host wait; `batch.live` says how many. None: all are computed.
    """
    counted = batch.counted.flatten().to(device)
    if device.type in _HOSTS:
        found = counted.nonzero()[:, 0]
        return (None if len(found) == len(counted) else found), counted
    if batch.live is None:
        return None, counted
    order = torch.argsort(counted.logical_not().to(torch.uint8), stable=True)
    return order[: batch.live], counted
