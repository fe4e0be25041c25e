"""The distillation loss users call: `KDLoss`, and `kd_loss` for a single call.

    loss = soft_weight · T² · D(teacher ‖ student at temperature T) + hard_weight · cross_entropy(student, labels)

Mask, weights and divisor are multiplied into one scale per row and term before a kernel runs; see
`Backend.row_scales`. So the kernels need no code for reductions, masks and shifts.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fastkd import agreement, arguments, at_once, autograd, gradients, placed, served, sources
from fastkd.call import Call, call_for
from fastkd.divergences import Divergence, resolve
from fastkd.live import Mask, checked, counted_on_host, moved
from fastkd.projection.loop import check_budget, for_backward
from fastkd.projection.sides import autocast_dtype
from fastkd.rows import RowSpec, Wants
from fastkd.sources import LogProbabilities, Mixture, Source, SparseTargets, Teacher, VocabShard

__all__ = ["KDLoss", "KDParts", "kd_loss"]

Reduction = Literal["mean", "sum", "none", "batchmean"]


class KDParts(NamedTuple):
    """`loss` is what to differentiate; `soft` (T² included) and `hard` are its unweighted terms, detached.

    loss = soft_weight · soft + hard_weight · hard. A term without its inputs is 0.
    """

    loss: Tensor
    soft: Tensor
    hard: Tensor


class KDLoss(nn.Module):
    """Knowledge-distillation loss on logits, fused: no probability tensor is formed.

    Args:
        temperature: T of the soft term, for student and teacher (Hinton et al. 2015), in [1e-30, 1e6].
        soft_weight, hard_weight: weights of the divergence and of the cross-entropy. A term of weight 0 costs nothing
            (unless `return_parts` asks for its value).
        alpha, alpha_on: one weight for both terms. `alpha_on="soft"` means α·soft + (1−α)·hard, `"hard"` means
            α·hard + (1−α)·soft. Published recipes use both, so alpha without alpha_on is an error.
        divergence: a name of `fastkd.divergences.TABLE` or an object carrying parameters: `fastkd.JSD(beta=.1)`; or a
            weighted sum of them, `fastkd.Mix({fastkd.ForwardKL(): 0.5, fastkd.TVD(): 0.5})`.
        teacher_temperature: the teacher's T where it differs from the student's.
        scale_t2: multiply the soft term, value and gradient, by T² (the student's T), so that the size of its gradient
            does not depend on T. No effect on `mse`, which has no temperature.
        ignore_index: label of the positions to leave out.
        reduction: `"mean"` over unmasked tokens (Σ mask·weights; `num_items` replaces it), `"sum"`, `"batchmean"`
            (sum ÷ first dimension) or `"none"` (one loss per token, 0 where masked).
        shift: score logits `[..., :-1, :]` against labels `[..., 1:]`, as causal language models need; `weights` move
            with the labels. No logits are copied. With `"none"` the result has the shape of `labels[..., 1:]`.
        mask_soft: whether `ignore_index` masks the soft term too. False: every position counts in the soft term, which
            then has its own divisor.
        vocab_size: count only the first `vocab_size` columns (vocabularies padded to different widths); the others
            have probability 0 and gradient 0.
        memory_budget: bytes of working memory for the logits of a `Projection`, beside the gradients; None for a
            default (see `fastkd.plan`). Losses on logits need none.
        inplace: write the student's gradient over its logits: no memory beyond row scalars. The logits are destroyed,
            and autograd's version counter is bumped. They must share no memory with teacher, labels or weights, nor
            overlap themselves: that raises ValueError. Not with `"none"`. Ignored under `torch.compile`, which plans
            memory itself, and for a `Projection`, which has no logits to keep.
        return_parts: return `KDParts(loss, soft, hard)`.

    Raises TypeError or ValueError for wrong arguments, before any work; the message quotes the value.
    """

    def __init__(
        self,
        temperature: float = 2.0,
        *,
        soft_weight: float = 0.5,
        hard_weight: float = 0.5,
        alpha: float | None = None,
        alpha_on: Literal["soft", "hard"] | None = None,
        divergence: str | Divergence = "forward_kl",
        teacher_temperature: float | None = None,
        scale_t2: bool = True,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        shift: bool = False,
        mask_soft: bool = True,
        vocab_size: int | None = None,
        memory_budget: int | None = None,
        inplace: bool = False,
        return_parts: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.soft_weight, self.hard_weight = _weights(soft_weight, hard_weight, alpha, alpha_on)
        self.divergence: Divergence = divergence  # type: ignore[assignment]  # resolved by __setattr__
        self.teacher_temperature = teacher_temperature
        self.scale_t2 = scale_t2
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.shift = shift
        self.mask_soft = mask_soft
        self.vocab_size = vocab_size
        self.memory_budget = memory_budget
        self.inplace = inplace
        self.return_parts = return_parts
        self._check_settings()

    def forward(
        self,
        student: Source,
        teacher: Teacher | None,
        labels: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        num_items: float | Tensor | None = None,
        live: int | None = None,
    ) -> Tensor | KDParts:
        """The loss of one batch.

        Args:
            student: logits `[..., V]`, fp32 / bf16 / fp16 (float64 on the reference backend), or a
                `fastkd.Projection`: hidden states and output head, whose logits are never formed as a whole. Or a
                `fastkd.VocabShard` of either; DTensors are taken for one, logits that are `Shard(-1)` and projections
                of hidden states that are `Replicate()` with a weight that is `Shard(0)`.
            teacher: the same, of the same leading shape, or `fastkd.SparseTargets`: what a cache kept of it, or a
                `fastkd.Mixture` of several. It gets no gradient; a warning says so once, if it requires one. May be
                None where `soft_weight=0`.
            labels: token ids `[...]`. May be None where `hard_weight=0`; positions equal to `ignore_index` are masked.
            weights: per-token weights `[...]`, multiplied into both terms and into the mean's divisor. Get no
                gradient: ValueError if they require it.
            num_items: replaces the mean's divisor: the number of unmasked tokens of the whole optimiser step under
                gradient accumulation. A number, or a 0-dim tensor on any device.
            live: the number of tokens that count: not `ignore_index`, weight not 0, after the shift; all, where the
                soft term is taken and `mask_soft=False`. From hidden states on a GPU the others are then left out of
                every product, which a GPU cannot do by itself without making the host wait. On the CPU they always are,
                and losses on logits skip them. A wrong number raises ValueError; on a GPU, where values are not looked
                at, it makes loss and gradients NaN (ValueError with `FASTKD_DEBUG=1`).

        Beside a `Projection` on a GPU, labels and weights may be on the CPU. They are counted there, and no `live` is
        needed (but under `torch.compile`, which looks at no values). Where they are in pinned memory, the copy reads
        them after the call has returned.

        Returns:
            fp32 (float64 for float64 logits): a scalar, or the leading shape for `reduction="none"`;
            `KDParts` with `return_parts=True`. With nothing unmasked the loss and all gradients are 0. Gradients are
            those of one backward: forward mode (`torch.func.jvp`) raises NotImplementedError.
        """
        self._check_settings()
        if live is None and not torch.compiler.is_compiling():
            computed = at_once.loss(self, student, teacher, labels, weights, num_items)
            if computed is not None:
                return computed
        student, teacher = placed.here(student, "student", self.inplace), placed.here(teacher, "teacher")
        labels, weights = placed.beside(labels, "labels"), placed.beside(weights, "weights")
        num_items = placed.beside(num_items, "num_items")
        given = student, teacher, labels, weights, num_items, live
        found: Tensor | KDParts = agreement.together((student, teacher), self._computed, *given)
        return found

    def _computed(
        self, student: Any, teacher: Any, labels: Any, weights: Any, num_items: Any, live: int | None
    ) -> Tensor | KDParts:
        """`forward` of what this rank has."""
        if isinstance(teacher, LogProbabilities):
            self._check_served("dense", teacher)
            teacher = teacher.as_subclass(Tensor)
        if isinstance(teacher, Mixture):
            self._check_served("mixture", teacher)
        vocab_size = sources.check(student, teacher, labels, weights, self.vocab_size)
        if isinstance(teacher, Mixture):
            teacher = teacher.simplified()
        gradients.check(student, teacher, weights, num_items)
        self._check_call(student, teacher, labels, weights, num_items, live)
        placed.check_cut(student)
        placed.check_cut(teacher)
        student = placed.student_here(student)
        if labels is not None:
            labels = labels.detach().to(torch.int64)

        want_soft = teacher is not None and (self.soft_weight > 0 or self.return_parts)
        want_hard = labels is not None and (self.hard_weight > 0 or self.return_parts)
        student, teacher = sources.whole(student), sources.whole(teacher if want_soft else None)
        mask = Mask(labels if self.mask_soft or not want_soft else None, weights, self.ignore_index, self.shift)
        at_most = counted_on_host(mask, student.device, student.shape[:-1])
        labels, weights = moved(labels, student.device), moved(weights, student.device)
        soft_scale, hard_scale, labels = self._row_scales(student, labels, weights, num_items)
        if live is not None:
            soft_scale, hard_scale = checked(live, mask, student.shape[:-1], soft_scale, hard_scale)
        call = call_for(
            student,
            None if teacher is None else teacher.detach(),
            labels if want_hard else None,
            soft_scale if want_soft else None,
            hard_scale if want_hard else None,
            self.row_spec(vocab_size),
            autocast_dtype(student.device),
            None if self.memory_budget is None else int(self.memory_budget),
            at_most if live is None else live,
        )
        loss, soft, hard = self._run(call)

        if self.reduction == "none":
            loss = self._per_token(loss, student)
        if not self.return_parts:
            return loss
        soft, hard = (self._t2() * soft_scale * soft, hard_scale * hard)
        if self.reduction == "none":
            return KDParts(loss, self._per_token(soft, student), self._per_token(hard, student))
        return KDParts(loss, soft.sum(), hard.sum())

    def _run(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        parameters = call.student, call.student_weight, call.student_bias
        wants = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in parameters]
        idle, weighted = call.split()
        if idle is not None and any(wants):
            if not weighted.on_logits and not torch.compiler.is_compiling():
                check_budget(weighted, Wants(*wants))
            # return_parts asks for the value of a term of weight 0. In the gradient, 0 times a NaN of it would be NaN.
            with torch.no_grad():
                _, *values = self._run(idle)  # first, since in place the logits are about to go
            loss, *others = self._run(weighted)
            soft, hard = (value + other for value, other in zip(values, others, strict=True))  # one of them is absent
            return loss, soft, hard
        if self.reduction == "none":
            if any(wants) and not torch.compiler.is_compiling():
                call = for_backward(call, Wants(*wants))
            loss, soft, hard, *_ = autograd.kd_loss_per_row(*call)
            return loss, soft, hard
        if self.inplace and wants[0] and call.student_weight is None and not torch.compiler.is_compiling():
            return autograd.kd_loss_(*call)
        loss, soft, hard, *_ = autograd.kd_loss(*call, wants)
        return loss, soft, hard

    def _per_token(self, rows: Tensor, student: Source) -> Tensor:
        tokens = rows.reshape(student.shape[:-1])
        return tokens[..., :-1] if self.shift else tokens

    def _row_scales(
        self, student: Source, labels: Tensor | None, weights: Tensor | None, num_items: float | Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What each row's soft and hard value is multiplied by, and the label it is scored against, `[rows]` each."""
        number = None if num_items is None or isinstance(num_items, Tensor) else float(num_items)
        scales, moved = autograd.row_scales(
            sources.parts("student", student)["student"],
            labels,
            weights,
            num_items if number is None else None,
            number,
            self.reduction,
            int(self.ignore_index),
            bool(self.shift),
            bool(self.mask_soft),
        )
        soft_and_hard = scales.unbind()
        if labels is not None:
            labels = moved if self.shift else labels.reshape(-1)
        return soft_and_hard[0], soft_and_hard[-1], labels

    def __setattr__(self, name: str, value: Any) -> None:
        """Whoever changes a setting has it checked at the next call, and a divergence at once."""
        if name == "divergence":
            value = resolve(value)
        super().__setattr__(name, value)
        if name not in ("_checked", "templates"):
            self._checked = False
            self.templates: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what holds in this process only."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_checked", "templates")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of this version or an earlier one, which kept no templates."""
        super().__setstate__({**state, "_checked": False, "templates": {}})  # type: ignore[no-untyped-call]

    def _check_settings(self) -> None:
        if self._checked and not torch.compiler.is_compiling():
            return
        arguments.temperature("temperature", self.temperature)
        if self.teacher_temperature is not None:
            arguments.temperature("teacher_temperature", self.teacher_temperature)
        for name in ("soft_weight", "hard_weight"):
            arguments.number(name, getattr(self, name))
        for name in ("scale_t2", "shift", "mask_soft", "inplace", "return_parts"):
            arguments.switch(name, getattr(self, name))
        arguments.integer("ignore_index", self.ignore_index)
        if not -(2**63) <= self.ignore_index < 2**63:  # C would take its lower bits
            raise ValueError(f"ignore_index must fit in 64 bits, as labels do, got {self.ignore_index}")
        if self.vocab_size is not None:
            arguments.integer("vocab_size", self.vocab_size, least=1)
        if self.memory_budget is not None:
            arguments.number("memory_budget", self.memory_budget, above=True)
        if self.soft_weight == self.hard_weight == 0:
            raise ValueError("soft_weight and hard_weight are both 0: there is nothing to compute")
        if self.reduction not in get_args(Reduction):
            raise ValueError(f"reduction must be 'mean', 'sum', 'none' or 'batchmean', got {self.reduction!r}")
        if self.inplace and self.reduction == "none":
            raise ValueError("inplace=True cannot go with reduction='none', whose backward needs the logits again")
        if not torch.compiler.is_compiling():
            self._checked = True

    def row_spec(self, vocab_size: int) -> RowSpec:
        """What is computed on every row."""
        return RowSpec(
            self.divergence.name,
            self.divergence.parameters,
            float(self.temperature),
            float(self._teacher_temperature()),
            float(self.soft_weight) * self._t2(),
            float(self.hard_weight),
            vocab_size,
        )

    def _t2(self) -> float:
        return float(self.temperature) ** 2 if self.scale_t2 and self.divergence.tempered else 1.0

    def _teacher_temperature(self) -> float:
        return self.temperature if self.teacher_temperature is None else self.teacher_temperature

    def _check_call(
        self,
        student: Source,
        teacher: Teacher | None,
        labels: Tensor | None,
        weights: Tensor | None,
        num_items: float | Tensor | None,
        live: int | None,
    ) -> None:
        if labels is None and self.hard_weight > 0:
            raise ValueError(f"labels are needed for hard_weight={self.hard_weight}; pass them or set hard_weight=0")
        if teacher is None and self.soft_weight > 0:
            raise ValueError(f"a teacher is needed for soft_weight={self.soft_weight}; pass one or set soft_weight=0")
        if isinstance(teacher, SparseTargets):
            self._check_sparse(teacher)
        if self.shift and student.dim() < 2:
            raise ValueError(f"shift=True needs logits [..., sequence, vocab], got shape {tuple(student.shape)}")
        if self.reduction == "batchmean" and student.dim() < 2:
            raise ValueError(f"reduction='batchmean' needs a batch dimension, got logits {tuple(student.shape)}")
        if live is not None:
            arguments.integer("live", live, least=0)
            if live > student.shape[:-1].numel():
                raise ValueError(f"live={live}, but there are {student.shape[:-1].numel()} tokens")
        if num_items is not None:
            if self.reduction != "mean":
                raise ValueError(
                    f"num_items replaces the divisor of reduction='mean'; it has no meaning for {self.reduction!r}"
                )
            if isinstance(num_items, Tensor):
                if num_items.numel() != 1:
                    raise ValueError(f"num_items must hold one number, got a tensor of shape {tuple(num_items.shape)}")
                arguments.check_counts("num_items", num_items)
            else:
                arguments.number("num_items", num_items)
        written = student.source if isinstance(student, VocabShard) else student
        if self.inplace and isinstance(written, Tensor) and not torch.compiler.is_compiling():
            gradients.check_writable(written, teacher, labels, weights)

    def _check_served(self, kind: str, teacher: Teacher) -> None:
        reason = served.refusal(kind, self.divergence)
        if reason is not None:
            raise ValueError(f"{type(teacher).__name__} cannot serve this loss: {reason}")

    def _check_sparse(self, teacher: SparseTargets) -> None:
        self._check_served(teacher.kind, teacher)
        temperature = self._teacher_temperature()
        if not math.isclose(teacher.temperature, temperature, rel_tol=1e-6):
            raise ValueError(
                f"SparseTargets were made at temperature {teacher.temperature}, but this loss takes the teacher at "
                f"{temperature}: use the same, or make them again (they cannot be converted)"
            )

    def extra_repr(self) -> str:
        """Settings as printed by `print(module)`."""
        return (
            f"temperature={self.temperature}, soft_weight={self.soft_weight}, hard_weight={self.hard_weight}, "
            f"divergence={self.divergence}, reduction={self.reduction!r}"
        )


def kd_loss(
    student: Source,
    teacher: Teacher | None,
    labels: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    live: int | None = None,
    temperature: float = 2.0,
    soft_weight: float = 0.5,
    hard_weight: float = 0.5,
    alpha: float | None = None,
    alpha_on: Literal["soft", "hard"] | None = None,
    divergence: str | Divergence = "forward_kl",
    teacher_temperature: float | None = None,
    scale_t2: bool = True,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    shift: bool = False,
    mask_soft: bool = True,
    vocab_size: int | None = None,
    memory_budget: int | None = None,
    inplace: bool = False,
    return_parts: bool = False,
) -> Tensor | KDParts:
    """`KDLoss(...)(student, teacher, labels, weights=…, num_items=…, live=…)`; arguments are described there."""
    loss = KDLoss(
        temperature,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        alpha=alpha,
        alpha_on=alpha_on,
        divergence=divergence,
        teacher_temperature=teacher_temperature,
        scale_t2=scale_t2,
        ignore_index=ignore_index,
        reduction=reduction,
        shift=shift,
        mask_soft=mask_soft,
        vocab_size=vocab_size,
        memory_budget=memory_budget,
        inplace=inplace,
        return_parts=return_parts,
    )
    return loss.forward(student, teacher, labels, weights=weights, num_items=num_items, live=live)


def _weights(soft_weight: float, hard_weight: float, alpha: float | None, alpha_on: str | None) -> tuple[float, float]:
    if alpha is None:
        if alpha_on is not None:
            raise ValueError(f"alpha_on={alpha_on!r} was given without alpha")
        return soft_weight, hard_weight
    if alpha_on not in ("soft", "hard"):
        raise ValueError(
            f"alpha={alpha} alone is ambiguous: published recipes put alpha on the soft or on the hard term. "
            f"Pass alpha_on='soft' or alpha_on='hard' (got {alpha_on!r}), or soft_weight= and hard_weight="
        )
    if arguments.number("alpha", alpha) > 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha!r}")
    if (soft_weight, hard_weight) != (0.5, 0.5):
        raise ValueError("pass either alpha with alpha_on, or soft_weight and hard_weight, not both")
    return (alpha, 1 - alpha) if alpha_on == "soft" else (1 - alpha, alpha)
