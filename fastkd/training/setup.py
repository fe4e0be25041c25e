"""What every command on a teacher and text begins with: all checks that need no work, then the teacher."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from fastkd.cache.fingerprints import fingerprint, state_fingerprint
from fastkd.processes import Processes
from fastkd.training import caching, checks, loading
from fastkd.training.adapters import adapt, check_adapters
from fastkd.training.arguments import arguments, distillation_loss
from fastkd.training.cut import cut_configuration, cut_student
from fastkd.training.data import Corpus, load_corpus
from fastkd.training.judge import Judge
from fastkd.training.launcher import started
from fastkd.training.options import TRAINED_TEACHER, InputError, ModelOptions, Options
from fastkd.training.plain import visible
from fastkd.training.sharding import check_sharding
from fastkd.training.teaching_checks import check_length, check_teaching, check_terms, others

__all__ = ["Materials", "Setup", "check", "configurations", "gather", "with_teacher"]


class Materials(NamedTuple):
    """What is needed beside models."""

    device: torch.device
    tokenizer: Any
    corpus: Corpus

    def fingerprints(self) -> dict[str, str]:
        """Of the windows of each kind: what text, tokenizer and split have made."""
        named = self.corpus.texts().items()
        return {name: _digest(f"{list(ids.shape)}".encode() + ids.numpy().tobytes()) for name, ids in named}


@dataclass
class Setup:
    """A teacher that has been judged, and all that is needed to make and judge students of it."""

    options: Options
    materials: Materials
    counted: int | None  # ids that count, where the output heads of the models are padded differently
    student_config: Any
    teacher: Any  # None once it is not needed any more
    judge: Judge
    loaded: ModelOptions  # which the teacher was loaded by

    @property
    def vocab_size(self) -> int:
        """Ids that count."""
        return self.counted or loading.vocabulary_size(self.teacher.config)

    def student(self) -> Any:
        """A student; the same one, to the last bit of its weights, at every call."""
        transformers.set_seed(self.options.training.seed)
        models, device = self.options.models, self.materials.device
        if not models.cut:
            return loading.load_student(models, self.student_config, device)
        size = self.options.evaluation.eval_batch_size
        student = cut_student(self.loaded, self.teacher, self.materials.corpus.train, size, device)
        return adapt(student, models)

    def fingerprints(self, student: Any) -> dict[str, str]:
        """Of what a resumed run takes from elsewhere than its checkpoints, before training.

        Of the student these are its configuration and shapes, and the weights that adapters leave as they are.
        """
        assert self.teacher is not None
        config = {name: value for name, value in student.config.to_dict().items() if name != "transformers_version"}
        shapes = {name: list(weight.shape) for name, weight in student.state_dict().items()}
        made = json.dumps([config, shapes], sort_keys=True, default=str)
        if self.options.models.lora_rank:
            frozen = {name: weight for name, weight in student.state_dict().items() if "lora_" not in name}
            made += state_fingerprint(frozen)
        return {"teacher": fingerprint(self.teacher), "student": _digest(made.encode())}


def check(options: Options) -> tuple[torch.device, Any, Any]:
    """Check what can be checked without text and models: (device, tokenizer, the student's configuration).

    Raises InputError.
    """
    device = _training_device(options)
    check_sharding(options, device)
    distillation_loss(options.distillation)  # refuses what it cannot mean
    transformers.utils.logging.disable_progress_bar()  # of loading and saving: there is one for the training
    tokenizer = loading.load_tokenizer(options.models.teacher)
    checks.check_tokenizers(tokenizer, loading.student_tokenizer(options.models, tokenizer))
    caching.check_cache(options, tokenizer)
    check_teaching(options, tokenizer)
    _, student, teacher = configurations(options, tokenizer)
    check_terms(options, student, teacher, tokenizer)
    check_adapters(options.models, student)
    return device, tokenizer, student


def gather(options: Options) -> Materials:
    """Check what can be checked without a model, then read the text. Raises InputError."""
    device, tokenizer, _ = check(options)
    corpus = load_corpus(options.data, tokenizer, options.evaluation.eval_windows, options.training.seed)
    needed = options.training.batch_size * started()
    if len(corpus.train) < needed:
        raise InputError(
            f"{options.data.data} gives {len(corpus.train)} windows to train on, but a batch needs "
            f"{needed}: use more text (--size), a smaller --max-length or a smaller --batch-size"
        )
    check_length(options, len(corpus.train))
    print(visible(f"data: {corpus.description()}"))
    return Materials(device, tokenizer, corpus)


def with_teacher(
    options: Options, materials: Materials, *, on_validation: bool = False, processes: Processes | None = None
) -> Setup:
    """Load the teacher and judge it, on held-out or on validation text, in all `processes`. Raises InputError."""
    vocab_size, config, _ = configurations(options, materials.tokenizer)
    teacher = loading.load_teacher(options.models, materials.device)
    checks.check_frozen(teacher)
    caching.check_teacher(options, teacher)
    corpus = materials.corpus
    if on_validation:
        corpus = replace(corpus, held_out=corpus.validation, tasks=())  # nothing of what they hold out is seen
    judge = Judge(teacher, materials.tokenizer, corpus, options, vocab_size, processes)
    return Setup(options, materials, vocab_size, config, teacher, judge, options.models)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _training_device(options: Options) -> torch.device:
    """Where Trainer will put the student. Raises InputError for several devices of one process."""
    chosen = arguments(options, Path(options.training.output))
    if chosen.n_gpu > 1:
        raise InputError(
            f"a process trains on one device, but this one sees {chosen.n_gpu}: set CUDA_VISIBLE_DEVICES=0, or start a "
            f"process for each: torchrun --nproc-per-node {chosen.n_gpu} -m fastkd ..."
        )
    return torch.device("cpu") if chosen.device.type == "cpu" else chosen.device  # accelerate numbers that too


def configurations(options: Options, tokenizer: Any) -> tuple[int | None, Any, Any]:
    """(number of ids that count, or None for all; the student's configuration; the teacher's). Raises InputError."""
    models, trained = options.models, options.models.teacher == TRAINED_TEACHER
    teacher = loading.trained_config(tokenizer) if trained else loading.teacher_config(models.teacher)
    if models.cut:
        student = cut_configuration(models, teacher)
    else:
        student = loading.student_config(models, loading.vocabulary_size(teacher), tokenizer)
    configs = {"student": student, "teacher": teacher, **others(options, student, tokenizer)}
    checks.check_context(options.data.max_length, configs)
    return checks.common_vocabulary(configs, tokenizer), student, teacher
