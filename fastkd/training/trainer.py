"""`KDTrainer`: transformers' Trainer with fastkd's distillation loss in place of the model's own loss.

    trainer = KDTrainer(student, arguments, kd=fastkd.KDLoss(shift=True), teacher=teacher, train_dataset=...)

Everything else is Trainer's: optimizer, schedules, mixed precision, accumulation, several devices, checkpoints.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import EvalPrediction

import fastkd
from fastkd.sources import tensors
from fastkd.teachers import Cached, Frozen, TeacherMode
from fastkd.terms import Batch, Course, KDTerm, Outputs, RouterTerm, Term, Terms, asks_for_router_loss, outputs_of
from fastkd.terms.term import RESERVED
from fastkd.training.beside import TrainsBeside
from fastkd.training.counting import COUNT, SHIFTED, Counting, Labels, labels_of
from fastkd.training.sharding import is_sharded

__all__ = ["Course", "KDTrainer", "logged_beside"]

_TAUGHT, _POSITIONS = "teacher", "position_ids"  # where a batch has the teacher's predictions, and tokens' positions
_NO_LOGITS = "no logits are formed; evaluation gives eval_hard and eval_perplexity, for more override prediction_step"
#: What Trainer takes and a loss without logits cannot: (name, values that ask for nothing, what to do).
_REFUSED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("compute_loss_func", (None,), "override distillation_loss instead"),
    ("compute_metrics", (None,), _NO_LOGITS),
    ("preprocess_logits_for_metrics", (None,), _NO_LOGITS),
    ("include_for_metrics", (None, []), _NO_LOGITS),
    ("batch_eval_metrics", (False,), _NO_LOGITS),
    ("eval_do_concat_batches", (True,), _NO_LOGITS),
    ("label_smoothing_factor", (0,), "the teacher's predictions take its place; override distillation_loss to add it"),
    ("loss_type", ("nll", "chunked_nll"), "of TRL's SFTTrainer; the distillation loss takes its place"),
    ("label_names", (None, ["labels"]), "labels are found under 'labels'"),
    ("torch_compile", (False,), "compile the student's body instead: model.base_model.compile()"),
)


class KDTrainer(TrainsBeside):
    """Trains a causal language model on a teacher's predictions and the labels.

    Args:
        model, args, ...: as of Trainer. With `args.remove_unused_columns` examples keep what the trainer itself reads:
            `shift_labels`, `position_ids`, and what they bring for the teacher: its predictions, or its name.
        kd: the loss, `KDLoss()` by default. A copy is used, with `shift=True` and `return_parts=True`.
        teacher: a frozen model in eval mode with the student's vocabulary, on the student's device; or one of
            `fastkd.teachers`, which learn or follow the student. Or None: then batches bring the teacher's predictions
            under `"teacher"`, a `fastkd.SparseTargets` or logits `[batch, tokens, ...]`, as `fastkd.cache.Collator`
            makes them, or `kd.soft_weight` is 0. Predictions that a batch brings win over a frozen model, and are
            refused beside the other teachers.
        eval_collator: makes batches of the evaluation examples, which need no teacher. Default: `data_collator`.
        terms: what the loss has beside `kd`, each a `fastkd.terms.Term`. Their parameters are trained, clipped and kept
            in checkpoints with the student's; their optimizer state too. A student with `output_router_logits` brings a
            term of its own, the loss of its router, with the weight of its configuration, unless one is given.
        temperature, soft_weight: how they change over the training, if they do. The hard weight changes too, so that
            the sum of both weights stays the same.

    Batches are dicts of `input_ids`, `attention_mask` and `labels` `[batch, tokens]`. A label is −100 where it must not
    be learnt. The first label of a row counts for nothing: no token predicts it. Nor does one whose `position_ids` do
    not continue those before it: rows of several documents, also for a student that takes no positions.
    `shift_labels`, where a batch has them, are taken in place of `labels`: they are at the positions that predict them,
    and all count. Whatever collator makes a batch, what counts is counted there, for GPUs to leave the other tokens
    out; not where the dataset is an IterableDataset.

    The losses logged are means over all predicted tokens since the last line: `loss`, `hard`, `soft` (T² included),
    `ratio` = hard ÷ soft (not where soft is 0), and the value of each term, unweighted, under its name.
    `tokens_per_second` is of all devices, from the first step on, without the time of evaluations and checkpoints.
    Losses are read from the device when they are logged, not at every step.

    TRL's data preparation comes with `class K(KDTrainer, SFTTrainer): pass`, which takes SFTTrainer's arguments too.

    Raises ValueError where the teacher is trainable, in training mode, or needed and not given, for several GPUs in one
    process, for a live teacher under context parallelism, for DeepSpeed's sequence parallelism, for terms or a teacher
    that the models cannot serve, and for arguments of Trainer that could take no part: metrics of logits, other losses,
    label smoothing, `torch_compile`.
    """

    def __init__(
        self,
        *args: Any,
        kd: fastkd.KDLoss | None = None,
        teacher: nn.Module | TeacherMode | None = None,
        eval_collator: Callable[[Any], Any] | None = None,
        terms: Sequence[Term] = (),
        temperature: Course | None = None,
        soft_weight: Course | None = None,
        **kwargs: Any,
    ) -> None:
        first = KDTerm(kd, temperature=temperature, soft_weight=soft_weight)
        given = inspect.signature(super().__init__).bind_partial(*args, **kwargs).arguments  # perhaps of TRL's trainer
        _check_arguments(given)
        super().__init__(**{**given, "compute_metrics": _mean_hard_loss})
        if self.args.n_gpu > 1:  # Trainer would split batches with DataParallel, beside which a Projection is whole
            raise ValueError(
                f"KDTrainer uses one GPU per process, but sees {self.args.n_gpu}: start it with torchrun, a process "
                "for each, or set CUDA_VISIBLE_DEVICES to one"
            )
        if self.get_sp_size() > 1:  # which has a loss of its own, and a count of its own
            raise ValueError(
                f"KDTrainer does not train with sp_size={self.get_sp_size()}: DeepSpeed's sequence parallelism "
                "computes the model's own loss. Take context parallelism, cp_size"
            )
        self.kd, self.eval_collator = first.kd, eval_collator or self.data_collator
        assert isinstance(self.model, nn.Module)
        routed = asks_for_router_loss(self.model) and not any(isinstance(term, RouterTerm) for term in terms)
        all_terms = Terms([first, *terms, *([RouterTerm(self.model)] if routed else [])], self.model)
        mode = _mode(teacher)
        if self.get_cp_size() > 1 and not isinstance(mode, Cached):
            raise ValueError(
                f"with cp_size={self.get_cp_size()} the student's attention goes across processes, but not that of "
                f"{type(mode).__name__}: let batches bring the teacher's predictions, as fastkd.cache.Collator does"
            )
        if not (all_terms.need_teacher or soft_weight or isinstance(mode, (Frozen, Cached))):
            raise ValueError(f"no term reads the teacher, so {type(mode).__name__} would take no part: take it away")
        mode.check(self.model, all_terms.needs, self.kd.vocab_size)
        if self.kd.soft_weight or soft_weight:
            mode.check_loss(self.kd.divergence)
        all_terms.check(self.model, mode.model)
        self._stand_beside(all_terms, mode)
        self._takes_positions = _takes(_POSITIONS, self.model)
        # The loss divides by the tokens of the whole step: Trainer counts them and must not divide again.
        self.model_accepts_loss_kwargs = True
        self._live: int | None = None
        self._counted: tuple[Labels | None, int | None] = None, None  # labels of the batch at hand, how many count
        self._sums: dict[str, Tensor] = {}  # of what the teacher logs, since the last line of logs
        self._logged = False  # whether anything was summed since then
        self._tokens, self._steps_logged, self._paused = 0, 0, 0.0
        self._since: float | None = None  # when the first step since the last line of logs began

    def _set_signature_columns_if_needed(self) -> None:
        """As Trainer's: which columns of the examples stay. The model's arguments, and what is read here."""
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        mode = getattr(self, "teacher", None)  # TRL asks before there is one
        read = (SHIFTED, _POSITIONS, _TAUGHT, *getattr(mode, "columns", ()))
        columns += [name for name in read if name not in columns]

    def distillation_loss(
        self, model: nn.Module, inputs: dict[str, Any], teacher: Outputs, labels: Tensor, num_items: Any
    ) -> Tensor:
        """The loss of one batch, of all terms. An addend is a Term; override this for more.

        `inputs` are the model's. `labels` are those of the batch, −100 where a document begins, or its `shift_labels`.
        `num_items` is the number of tokens of the optimizer step, to divide by.
        """
        student = outputs_of(model, self._for_models(inputs), self.terms.students_needs)
        counted, live = self._counted
        # An override of this method may mask others.
        unchanged, shifted = counted is not None and labels is counted.labels, counted is not None and counted.shifted
        batch = Batch(labels, inputs, num_items, live if unchanged else None, shifted)
        with self.accelerator.autocast():  # Trainer sees to the student's own forward alone
            loss: Tensor = self.terms(student, teacher, batch)
            for name, value in self.teacher.loss(student, batch).items():
                loss = loss + value
                self._sums[name] = self._sums.get(name, 0.0) + value.detach().float()
        return loss

    def soft_targets(self, model: nn.Module, inputs: dict[str, Any]) -> Outputs:
        """What the teacher says of one batch; takes what the batch brings for it out of `inputs`."""
        taken = {name: inputs.pop(name) for name in {_TAUGHT, *self.teacher.columns} if name in inputs}
        told = taken.get(_TAUGHT) is not None
        if told and not isinstance(self.teacher, Frozen) and _TAUGHT not in self.teacher.columns:
            raise ValueError(
                f"a batch brings the teacher's predictions, but {type(self.teacher).__name__} makes its own: take "
                f"{_TAUGHT!r} out of the batches, or pass teacher=None to learn from them"
            )
        if not (self.terms.need_teacher or self.teacher.trained):
            return Outputs(None)
        if told and isinstance(self.teacher, Frozen):
            if any(map(is_sharded, self.teacher.in_step)):  # processes whose batches bring none would wait for this one
                raise ValueError(
                    "a batch brings the teacher's predictions, but the teacher is in parts on all processes, which "
                    "run it together: pass teacher=None, or batches without"
                )
            return Cached().outputs(model, inputs, taken)  # batches win over a live teacher
        with self.accelerator.autocast():
            student = self.accelerator.unwrap_model(model)
            return self.teacher.outputs(student, self._for_models(inputs), taken, self.terms.teachers_needs)

    def _for_models(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Without positions where the student takes none: they are kept for labels and terms then."""
        return {name: one for name, one in inputs.items() if name != _POSITIONS or self._takes_positions}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Trainer's hook. There are no outputs to return: no logits are formed."""
        if return_outputs:
            raise ValueError("KDTrainer forms no logits, so there are no outputs to return")
        progress = self.state.global_step / max(self.state.max_steps, 1)
        self.terms.follow(progress)
        self.teacher.follow(progress)
        inputs = dict(inputs)
        if inputs.get("output_router_logits") and not asks_for_router_loss(model):
            raise ValueError(
                "a batch has output_router_logits=True, but the student's configuration has not: set it there, and "
                "the router's loss is one of the terms"
            )
        found, calls = _labels_of(inputs), self.terms.calls
        self._counted = found, self._live
        inputs = {name: value for name, value in inputs.items() if name not in ("labels", SHIFTED)}
        if not self._logged:
            self._logged, self._steps_logged = True, self.state.global_step
        loss = self.distillation_loss(model, inputs, self.soft_targets(model, inputs), found.labels, num_items_in_batch)
        if self.terms.calls == calls:
            raise ValueError(
                f"{type(self).__name__}.distillation_loss does not call KDTrainer's, so the terms "
                f"{self.terms.names} take no part: call super().distillation_loss, or self.terms"
            )
        self._tokens += found.labels.numel()
        return loss * self._averaged if num_items_in_batch is not None else loss

    @property
    def _averaged(self) -> int:
        """What a loss that divides by the tokens of all processes is multiplied by: gradients will be averaged."""
        return self._parts if self.args.average_tokens_across_devices else 1

    @property
    def _parts(self) -> int:
        """How many processes have tokens of their own: those of tensor parallelism share theirs."""
        return int(self.accelerator.num_processes // self.get_tp_size())

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        """Trainer's count of the labels of an optimizer step. Nothing predicts the first one of a sequence.

        Whether Trainer itself leaves it out depends on its version and on the model.
        """
        predicted = []
        for batch in batch_samples:
            labels = labels_of(batch)
            alone = None if labels is None else nn.functional.pad(labels.predicted, (1, 0), value=-100)
            predicted.append(batch if alone is None else {**batch, "labels": alone, SHIFTED: alone})
        count: Tensor | int | None = super()._get_num_items_in_batch(predicted, device)
        return count

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Sums of the hard loss and counts of tokens per row, `[batch]` each, for Trainer to gather."""
        inputs = dict(self._prepare_inputs(inputs))
        labels = _labels_of(inputs)
        for name in {"labels", SHIFTED, _TAUGHT, COUNT, *self.teacher.columns}:
            inputs.pop(name, None)
        with torch.no_grad():
            found = fastkd.project(model, **self._for_models(inputs))
            logits = _predicting(found, self.kd.vocab_size, labels.predicted.shape[1])
            with self.accelerator.autocast():
                logprobs = fastkd.row_statistics(logits, labels.predicted).label_logprob
        counted = labels.predicted != -100
        return None, -torch.where(counted, logprobs, 0.0).sum(1), counted.sum(1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss. Raises FloatingPointError where the loss is infinite or NaN."""
        if "loss" in logs and self._logged:
            steps, now = self.state.global_step - self._steps_logged, time.perf_counter()
            for name, value in {**self.terms.take_sums(), **self._sums}.items():
                logs[name] = self.accelerator.reduce(value * self._averaged, "mean").item() / steps
            soft, hard = logs.get("soft"), logs.get("hard")
            logs |= {"ratio": hard / soft} if soft and hard is not None else {}
            logs |= {"temperature": self.kd.temperature, "soft_weight": self.kd.soft_weight}
            tokens = self._tokens * self._parts
            assert self._since is not None
            logs["tokens_per_second"] = tokens / (now - self._since - self._paused)
            self._sums, self._logged, self._tokens = {}, False, 0
            self._since, self._paused = now, 0.0
            if not math.isfinite(logs["loss"]):
                raise FloatingPointError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}: lower --learning-rate"
                )
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's."""
        self._since = None  # what callbacks do before the first step is no training
        return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """As Trainer's, whose batches bring the number of tokens that count, for GPUs to leave the others out.

        Not where every token counts in the soft loss, nor where batches are cut apart after they were made.
        """
        dispatched = self.accelerator.dispatch_batches or isinstance(self.train_dataset, IterableDataset)
        if dispatched or not self.kd.mask_soft:
            return super().get_train_dataloader()
        given = self.data_collator
        self.data_collator = Counting(given)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = given

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As Trainer's, with `eval_collator`; an incomplete last batch is dropped in training alone."""
        training = self.args.dataloader_drop_last, self.data_collator
        self.args.dataloader_drop_last, self.data_collator = False, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last, self.data_collator = training

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's: `eval_hard`, the mean hard loss, also as `eval_loss`; and `eval_perplexity`."""
        return self._unclocked(super().evaluate, *args, **kwargs)  # type: ignore[no-any-return]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's. The number of tokens that count is for the loss: no model gets it."""
        if self._since is None:
            self._since, self._paused = time.perf_counter(), 0.0
        inputs = dict(inputs)
        self._live = inputs.pop(COUNT, None)
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        finally:
            self._live = None

    def _prepare_context_parallel_inputs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """As Trainer's, which leaves each process a part of every sequence: of what the teacher says of it too."""
        labels = labels_of(inputs)
        if self.get_cp_size() == 1 or labels is None:
            return super()._prepare_context_parallel_inputs(model, inputs)
        self._live = None  # it is of the whole
        if not labels.shifted:
            inputs = {**inputs, SHIFTED: fastkd.next_token_labels(labels.labels)}
        cut: Any
        cut, inputs = super()._prepare_context_parallel_inputs(model, inputs)
        taught = [] if inputs.get(_TAUGHT) is None else tensors(inputs[_TAUGHT])
        buffers, dims = [*cut.keywords["buffers"], *taught], [*cut.keywords["buffer_seq_dims"], *[1] * len(taught)]
        return partial(cut.func, buffers=buffers, buffer_seq_dims=dims, no_restore_buffers=set(buffers)), inputs

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._unclocked(super()._save_checkpoint, model, trial)

    def _unclocked(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return work(*args, **kwargs)
        finally:
            self._paused += time.perf_counter() - started


def logged_beside(line: dict[str, Any]) -> list[str]:
    """What a line of logs has of terms and of a teacher that learns: names, in order."""
    return [name for name in line if name not in RESERVED and not name.startswith("eval_")]


def _mode(teacher: nn.Module | TeacherMode | None) -> TeacherMode:
    if teacher is None:
        return Cached()
    return teacher if isinstance(teacher, TeacherMode) else Frozen(teacher)


def _takes(name: str, model: nn.Module) -> bool:
    """Whether a model can be given an argument: its forward names it, or takes any."""
    adapted = getattr(model, "get_base_model", None)  # of PEFT, whose own forward takes any
    parameters = inspect.signature((adapted() if adapted else model).forward).parameters
    return name in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def _labels_of(inputs: dict[str, Any]) -> Labels:
    found = labels_of(inputs)
    if found is None:
        raise ValueError(f"a batch has neither labels nor {SHIFTED}, but {', '.join(sorted(inputs))}")
    return found


def _predicting(logits: fastkd.Projection, vocab_size: int | None, tokens: int) -> fastkd.Projection:
    """The first positions, which predict one of the text, and the ids that count."""
    bias = None if logits.bias is None else logits.bias[:vocab_size]
    return replace(logits, hidden=logits.hidden[:, :tokens], weight=logits.weight[:vocab_size], bias=bias)


def _mean_hard_loss(found: EvalPrediction) -> dict[str, float]:
    hard = float(np.sum(found.predictions, dtype=np.float64) / np.sum(found.label_ids))
    # Trainer takes eval_loss for the best model where no other metric is named.
    return {"loss": hard, "hard": hard, "perplexity": math.exp(min(hard, 700.0))}


def _check_arguments(given: dict[str, Any]) -> None:
    """Raise ValueError for what Trainer takes and KDTrainer would ignore."""
    for name, idle, remedy in _REFUSED:
        value = given[name] if name in given else getattr(given.get("args"), name, idle[0])
        if value not in idle:
            raise ValueError(f"KDTrainer cannot use {name}={value!r}: {remedy}")
