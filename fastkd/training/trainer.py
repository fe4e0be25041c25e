"""`KDTrainer`: transformers' Trainer with fastkd's distillation loss in place of the model's own loss.

    trainer = KDTrainer(student, arguments, kd=fastkd.KDLoss(shift=True), teacher=teacher, train_dataset=...)

Everything else is Trainer's: optimizer, schedules, mixed precision, accumulation, several devices, checkpoints.
"""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import IterableDataset
from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import fastkd
from fastkd.sources import Teacher
from fastkd.training.options import Schedule
from fastkd.training.terms import Batch, Term, Terms

__all__ = ["Course", "KDTrainer"]


@dataclass(frozen=True)
class Course:
    """A value over the course of training: from `start` at the first step to `end` after the last."""

    start: float
    end: float
    shape: Schedule

    def at(self, progress: float) -> float:
        """The value when a share of the training, in [0, 1], is done."""
        if self.shape == "constant":
            return self.start
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * progress


_TERMS_FILE = "terms.pt"  # in a checkpoint, where terms have parameters or buffers
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


class KDTrainer(Trainer):
    """Trains a causal language model on a teacher's predictions and the labels.

    Args:
        model, args, ...: as of Trainer. `args.remove_unused_columns` must be False where batches carry a teacher.
        kd: the loss, `KDLoss()` by default. A copy is used, with `shift=True` and `return_parts=True`.
        teacher: a frozen model in eval mode with the student's vocabulary, on the student's device. Or None: then
            batches bring the teacher's predictions under `"teacher"`, a `fastkd.SparseTargets` or logits
            `[batch, tokens, ...]`, as `fastkd.cache.Collator` makes them, or `kd.soft_weight` is 0.
        eval_collator: makes batches of the evaluation examples, which need no teacher. Default: `data_collator`.
        terms: what the loss has beside `kd`, each a `fastkd.training.terms.Term`. Their parameters are trained, clipped
            and kept in checkpoints with the student's; their optimizer state too.
        temperature, soft_weight: how they change over the training, if they do. The hard weight changes too, so that
            the sum of both weights stays the same.

    Batches are dicts of `input_ids`, `attention_mask` and `labels` `[batch, tokens]`. A label is −100 where it must not
    be learnt. The first label of a row counts for nothing: no token predicts it. Whatever collator makes a batch, what
    counts is counted there, for GPUs to leave the other tokens out; not where the dataset is an IterableDataset.

    The losses logged are means over all predicted tokens since the last line: `loss`, `hard`, `soft` (T² included),
    `ratio` = hard ÷ soft (not where soft is 0), and the value of each term, unweighted, under its name.
    `tokens_per_second` is of all devices, without the time of evaluations and checkpoints. Losses are read from the
    device when they are logged, not at every step.

    TRL's data preparation comes with `class K(KDTrainer, SFTTrainer): pass`, which takes SFTTrainer's arguments too.

    Raises ValueError where the teacher is trainable, in training mode, or needed and not given, for several GPUs in one
    process, for a student with `output_router_logits`, whose router loss would be dropped, and for arguments of Trainer
    that could take no part: metrics of logits, other losses, label smoothing, `torch_compile`.
    """

    def __init__(
        self,
        *args: Any,
        kd: fastkd.KDLoss | None = None,
        teacher: nn.Module | None = None,
        eval_collator: Callable[[Any], Any] | None = None,
        terms: Sequence[Term] = (),
        temperature: Course | None = None,
        soft_weight: Course | None = None,
        **kwargs: Any,
    ) -> None:
        kd = fastkd.KDLoss() if kd is None else copy.deepcopy(kd)
        if kd.reduction != "mean":
            raise ValueError(f"KDTrainer needs a loss with reduction='mean', got {kd.reduction!r}")
        given = inspect.signature(super().__init__).bind_partial(*args, **kwargs).arguments  # perhaps of TRL's trainer
        _check_arguments(given)
        super().__init__(**{**given, "compute_metrics": _mean_hard_loss})
        _check_router(getattr(self.model, "config", None))
        if self.args.n_gpu > 1:  # Trainer would split batches with DataParallel, beside which a Projection is whole
            raise ValueError(
                f"KDTrainer uses one GPU per process, but sees {self.args.n_gpu}: start it with torchrun, a process "
                "for each, or set CUDA_VISIBLE_DEVICES to one"
            )
        if teacher is not None and (teacher.training or any(weight.requires_grad for weight in teacher.parameters())):
            raise ValueError("the teacher must be frozen and in eval mode: teacher.eval().requires_grad_(False)")
        kd.shift = kd.return_parts = True
        self.kd, self.teacher, self.eval_collator = kd, teacher, eval_collator or self.data_collator
        self.terms = Terms(terms, self.model).to(self.args.device)
        self._check_trained_terms()
        self._stepped = True  # no gradients of terms are to be kept
        self._courses = {"temperature": temperature, "soft_weight": soft_weight}
        self._total_weight = kd.soft_weight + kd.hard_weight
        # The loss divides by the tokens of the whole step: Trainer counts them and must not divide again.
        self.model_accepts_loss_kwargs = True
        self._live: int | None = None
        self._counted: tuple[Tensor | None, int | None] = None, None  # labels of the batch at hand, how many count
        self._parts: Tensor | None = None  # sums of soft and hard since the last line of logs
        self._tokens, self._steps_logged, self._since, self._paused = 0, 0, time.perf_counter(), 0.0

    def distillation_loss(
        self, model: nn.Module, inputs: dict[str, Any], teacher: Teacher | None, labels: Tensor, num_items: Any
    ) -> fastkd.KDParts:
        """The loss of one batch, in its parts, the terms added to `loss`. An addend is a Term; override this for more.

        `inputs` are the model's. `num_items` is the number of tokens of the optimizer step, to divide by.
        """
        if isinstance(model, FSDPModule):
            model.unshard()  # the output head, which stays whole until its gradient is reduced
        student = fastkd.project(model, **inputs)
        counted, live = self._counted
        options: dict[str, Any] = {}
        # Overrides, of this method or of the loss, may mask others.
        if live is not None and labels is counted and type(self.kd).forward is fastkd.KDLoss.forward:
            options["live"] = live
        parts: fastkd.KDParts = self.kd(student, teacher, labels, num_items=num_items, **options)
        if not len(self.terms):
            return parts
        added = self.terms(Batch(student, teacher, labels, inputs, num_items))
        return parts._replace(loss=parts.loss + added)

    def soft_targets(self, inputs: dict[str, Any]) -> Teacher | None:
        """The teacher's predictions of one batch; takes those it brings out of `inputs`."""
        found = inputs.pop("teacher", None)
        if self.kd.soft_weight == 0:
            return None
        if found is not None:
            return found.to(self.args.device)  # type: ignore[no-any-return]
        if self.teacher is None:
            raise ValueError(
                f"soft_weight is {self.kd.soft_weight}, but there is no teacher: pass one to KDTrainer, or batches "
                "with its predictions under 'teacher'"
            )
        with torch.no_grad():
            return fastkd.project(self.teacher, **inputs)

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
        self._follow_courses()
        inputs = dict(inputs)
        if inputs.get("output_router_logits"):
            raise ValueError(_ROUTER)
        labels, calls = inputs.pop("labels"), self.terms.calls
        self._counted = labels, self._live
        parts = self.distillation_loss(model, inputs, self.soft_targets(inputs), labels, num_items_in_batch)
        if len(self.terms) and self.terms.calls == calls:
            raise ValueError(
                f"{type(self).__name__}.distillation_loss does not call KDTrainer's, so the terms "
                f"{self.terms.names} take no part: call super().distillation_loss, or self.terms"
            )
        both = torch.stack((parts.soft, parts.hard))
        if self._parts is None:
            self._parts, self._steps_logged = torch.zeros_like(both), self.state.global_step
        self._parts += both
        self._tokens += labels.numel()
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            return parts.loss * self.accelerator.num_processes  # gradients will be averaged over processes
        return parts.loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        """Trainer's count of the labels of an optimizer step. Nothing predicts the first one of a sequence.

        Whether Trainer itself leaves it out depends on its version and on the model.
        """
        predicted = [
            {**batch, "labels": torch.nn.functional.pad(batch["labels"][..., 1:], (1, 0), value=-100)}
            if isinstance(batch.get("labels"), Tensor)
            else batch
            for batch in batch_samples
        ]
        count: Tensor | int | None = super()._get_num_items_in_batch(predicted, device)
        return count

    def _follow_courses(self) -> None:
        progress = self.state.global_step / max(self.state.max_steps, 1)
        for name, course in self._courses.items():
            if course is not None:
                setattr(self.kd, name, course.at(progress))
        if self._courses["soft_weight"] is not None:
            self.kd.hard_weight = max(self._total_weight - self.kd.soft_weight, 0.0)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Sums of the hard loss and counts of tokens per row, `[batch]` each, for Trainer to gather."""
        inputs = dict(self._prepare_inputs(inputs))
        labels = inputs.pop("labels")[:, 1:]
        for name in ("teacher", _COUNT):
            inputs.pop(name, None)
        with torch.no_grad():
            if isinstance(model, FSDPModule):
                model.unshard()
            logits = _predicting(fastkd.project(model, **inputs), self.kd.vocab_size)
            found = fastkd.row_statistics(logits, labels).label_logprob
        counted = labels != -100
        return None, -torch.where(counted, found, 0.0).sum(1), counted.sum(1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss. Raises FloatingPointError where the loss is infinite or NaN."""
        if "loss" in logs and self._parts is not None:
            soft, hard = self.accelerator.reduce(self._parts, "sum").tolist()
            steps, now = self.state.global_step - self._steps_logged, time.perf_counter()
            logs |= {"hard": hard / steps, "soft": soft / steps} | ({"ratio": hard / soft} if soft else {})
            for name, value in self.terms.take_sums().items():
                logs[name] = self.accelerator.reduce(value, "sum").item() / steps
            logs |= {"temperature": self.kd.temperature, "soft_weight": self.kd.soft_weight}
            tokens = self._tokens * self.accelerator.num_processes
            logs["tokens_per_second"] = tokens / (now - self._since - self._paused)
            self._parts, self._tokens = None, 0
            self._since, self._paused = now, 0.0
            if not math.isfinite(logs["loss"]):
                raise FloatingPointError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}: lower --learning-rate"
                )
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's."""
        self._since = time.perf_counter()
        if self.accelerator.num_processes > 1:
            for weight in self.terms.parameters():
                dist.broadcast(weight.data, 0)  # the same everywhere, as DDP makes the student
        return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """As Trainer's, whose batches bring the number of tokens that count, for GPUs to leave the others out.

        Not where every token counts in the soft loss, nor where batches are cut apart after they were made.
        """
        dispatched = self.accelerator.dispatch_batches or isinstance(self.train_dataset, IterableDataset)
        if dispatched or not self.kd.mask_soft:
            return super().get_train_dataloader()
        given = self.data_collator
        self.data_collator = _Counting(given, self.kd.ignore_index)
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

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As Trainer's, of the parameters of the terms too. ValueError where an optimizer that was given lacks them."""
        new = self.optimizer is None
        super().create_optimizer(*args, **kwargs)
        optimizer = self.optimizer
        assert optimizer is not None
        held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        trained = [(name, weight) for name, weight in self.terms.named_parameters() if weight.requires_grad]
        missing = [(name, weight) for name, weight in trained if id(weight) not in held]
        if missing and not new:
            raise ValueError(f"the optimizer lacks {len(missing)} parameters of terms: add those of each term to it")
        decayed = self.get_decay_parameter_names(self.terms)
        for decays, decay in ((True, self.args.weight_decay), (False, 0.0)):
            group = [weight for name, weight in missing if (name in decayed) == decays]
            if group:
                optimizer.add_param_group({"params": group, "weight_decay": decay})
        return optimizer

    def _check_trained_terms(self) -> None:
        """Raise ValueError where parameters of terms could not be trained as the student's are."""
        if not self.terms.trained:
            return
        assert isinstance(self.model, nn.Module)
        sharded = any(isinstance(module, FSDPModule) for module in self.model.modules())
        optim = str(getattr(self.args.optim, "value", self.args.optim))
        if sharded or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("terms with parameters cannot be trained beside a sharded student: use DDP")
        if "lomo" in optim or "layerwise" in optim:
            raise ValueError(f"terms with parameters cannot be trained by {optim!r}, which steps the student by layers")
        if self.args.max_grad_norm and not hasattr(Trainer, "_clip_grad_norm"):
            raise ValueError(
                f"the Trainer of transformers {transformers.__version__} would clip no gradients of terms: update it, "
                "or set max_grad_norm=0"
            )

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's, which zeroes and averages gradients of the model alone: those of the terms are done here.

        The number of tokens that count is for the loss, and leaves the batch before a model is given it.
        """
        if self._stepped:
            self.terms.zero_grad()
        inputs = dict(inputs)
        self._live = inputs.pop(_COUNT, None)
        try:
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        finally:
            self._live = None
        self._stepped = self.accelerator.sync_gradients  # the optimizer steps next
        if self._stepped and self.accelerator.num_processes > 1:
            for weight in self.terms.trained:
                found = torch.zeros_like(weight) if weight.grad is None else weight.grad
                weight.grad = self.accelerator.reduce(found, "mean")
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(self._with_terms(model))  # type: ignore[no-untyped-call]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        both = self._with_terms(model)
        return super()._get_grad_norm(both, grad_norm=grad_norm)  # type: ignore[no-untyped-call]

    def _with_terms(self, model: nn.Module) -> nn.Module:
        """What is asked for its parameters."""
        return nn.ModuleList([model, self.terms]) if self.terms.trained else model

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._unclocked(super()._save_checkpoint, model, trial)
        kept = self.terms.kept()
        if kept and self.args.should_save:
            directory = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            torch.save(kept, directory / _TERMS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_terms(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = str(self.state.best_model_checkpoint)
        if (Path(best) / _TERMS_FILE).is_file():  # Trainer warns where the checkpoint is gone
            self._load_terms(best)

    def _load_terms(self, checkpoint: str) -> None:
        file = Path(checkpoint) / _TERMS_FILE
        kept = torch.load(file, map_location=self.args.device, weights_only=True) if file.is_file() else {}
        self.terms.restore(kept, str(checkpoint))

    def _unclocked(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return work(*args, **kwargs)
        finally:
            self._paused += time.perf_counter() - started


#: Where a batch has the number of its tokens that count.
_COUNT = "live_tokens"


@dataclass(frozen=True)
class _Counting:
    """A collator that counts labels while they are on the CPU. The first of a row counts for nothing."""

    collator: Callable[[Any], Any]
    ignore_index: int

    def __call__(self, examples: Any) -> Any:
        batch = self.collator(examples)
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor) or labels.device.type != "cpu":
            return batch
        return {**batch, _COUNT: int((labels[..., 1:] != self.ignore_index).sum())}


def _predicting(logits: fastkd.Projection, vocab_size: int | None) -> fastkd.Projection:
    """The positions that predict one of the text, and the ids that count."""
    bias = None if logits.bias is None else logits.bias[:vocab_size]
    return replace(logits, hidden=logits.hidden[:, :-1], weight=logits.weight[:vocab_size], bias=bias)


def _mean_hard_loss(found: EvalPrediction) -> dict[str, float]:
    hard = float(np.sum(found.predictions, dtype=np.float64) / np.sum(found.label_ids))
    # Trainer takes eval_loss for the best model where no other metric is named.
    return {"loss": hard, "hard": hard, "perplexity": math.exp(min(hard, 700.0))}


_ROUTER = (
    "the student has output_router_logits=True, but KDTrainer does not add a router's auxiliary loss: set it to False, "
    "or add that loss in distillation_loss from a forward of its own"
)


def _check_arguments(given: dict[str, Any]) -> None:
    """Raise ValueError for what Trainer takes and KDTrainer would ignore."""
    for name, idle, remedy in _REFUSED:
        value = given[name] if name in given else getattr(given.get("args"), name, idle[0])
        if value not in idle:
            raise ValueError(f"KDTrainer cannot use {name}={value!r}: {remedy}")


def _check_router(config: Any) -> None:
    """Raise ValueError for a mixture of experts whose own loss has a term for its router."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "output_router_logits", False):
        raise ValueError(_ROUTER)
