"""Distil a causal language model into a smaller one, from the teacher's live logits. Read it top to bottom.

    fastkd distill                                                 # packaged teacher and reviews, on 2 cores
    fastkd distill --teacher gpt2 --data reviews.txt --steps 2000  # your own

The order: check all that can be checked without work, load, evaluate, train, evaluate, save. A run that fails
leaves nothing in the output directory.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import fastkd
from fastkd.training.data import batches, read_documents, split, token_windows
from fastkd.training.loading import check_positions, check_tokenizer, device_called, load, vocab_size_of
from fastkd.training.options import SMALL_GPT2, DistillOptions, InputError

__all__ = ["distill", "evaluate"]

METRICS_FILE = "metrics.json"
WARMUP_SHARE = 0.1  # of the steps
PROMPT_TOKENS, SAMPLE_TOKENS = 8, 40


def distill(options: DistillOptions) -> dict[str, Any]:
    """Run the distillation, print its report and return what metrics.json says.

    Raises InputError, before any training and with nothing written, where the options cannot be met.
    """
    started = time.perf_counter()
    output = Path(options.output)
    _check_output(output, options.overwrite)
    device = device_called(options.device)
    kd = _loss(options)
    train_documents, held_out_documents = split(read_documents(options.data), options.seed)
    teacher_config, tokenizer = load(AutoConfig, options.teacher), load(AutoTokenizer, options.teacher)
    student_config = _student_config(options.student_config, teacher_config, tokenizer)
    _check_models(teacher_config, student_config, tokenizer, options.context)
    train = token_windows(train_documents, tokenizer, options.context, options.steps * options.batch_size)
    held_out = token_windows(held_out_documents, tokenizer, options.context, options.eval_windows)
    if len(train) < options.batch_size or len(held_out) < 1:
        raise InputError(
            f"{options.data} gives {len(train)} training and {len(held_out)} held-out windows of "
            f"{options.context} tokens, but a batch needs {options.batch_size} and the evaluation 1: use "
            "more text, a smaller --context or a smaller --batch-size"
        )
    print(
        f"data: {len(train_documents):,} training and {len(held_out_documents):,} held-out documents; "
        f"of them {len(train):,} and {len(held_out):,} windows of {options.context} tokens are used"
    )

    transformers.set_seed(options.seed)
    student = AutoModelForCausalLM.from_config(student_config).to(device)
    teacher = load(AutoModelForCausalLM, options.teacher, dtype=torch.float32).to(device)
    teacher.eval().requires_grad_(False)
    assert not any(weight.requires_grad for weight in teacher.parameters())
    parameters = {"student": student.num_parameters(), "teacher": teacher.num_parameters()}
    print(
        f"student: {parameters['student']:,} parameters on {device}, "
        f"{parameters['student'] / parameters['teacher']:.2%} of the teacher's {parameters['teacher']:,}; "
        f"ready after {time.perf_counter() - started:.0f} s"
    )

    with _staged(output) as staging:
        before = evaluate(student, teacher, held_out, options.batch_size)
        samples = {"student before": _sample(student, tokenizer, held_out[0], options.seed)}
        history, seconds = _train(student, teacher, kd, train, options)
        after = evaluate(student, teacher, held_out, options.batch_size)
        samples["student after"] = _sample(student, tokenizer, held_out[0], options.seed)
        samples["teacher"] = _sample(teacher, tokenizer, held_out[0], options.seed)
        _report(before, after, samples)

        tokens = options.steps * options.batch_size * options.context
        metrics = {
            "before": before,
            "after": after,
            "samples": samples,
            "parameters": parameters,
            "training_tokens": tokens,
            "training_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "total_seconds": time.perf_counter() - started,
            "device": str(device),
            "options": asdict(options),
            "versions": {module.__name__: module.__version__ for module in (fastkd, torch, transformers)},
            "history": history,
        }
        student.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        (staging / METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(f"saved to {output} after {time.perf_counter() - started:.0f} s")
    return metrics


def _train(
    student: Any, teacher: Any, kd: fastkd.KDLoss, windows: Tensor, options: DistillOptions
) -> tuple[list[dict[str, float]], float]:
    """Train the student in place. Returns each step's losses, and the seconds all of them took."""
    matrices = [weight for weight in student.parameters() if weight.ndim >= 2]
    vectors = [weight for weight in student.parameters() if weight.ndim < 2]  # biases and norms: not decayed
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=options.learning_rate,
        betas=(0.9, 0.95),
    )
    schedule = transformers.get_cosine_schedule_with_warmup(
        optimizer, math.ceil(WARMUP_SHARE * options.steps), options.steps
    )
    history: list[dict[str, float]] = []
    student.train()
    started = time.perf_counter()
    with tqdm(total=options.steps, desc="distil", unit="step") as progress:
        for ids in itertools.islice(batches(windows, options.batch_size, options.seed), options.steps):
            ids = ids.to(student.device)
            with torch.no_grad():
                teacher_logits = _logits(teacher, ids) if options.soft_weight else None
            parts = kd(_logits(student, ids), teacher_logits, labels=ids)
            parts.loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

            losses = {name: value.item() for name, value in parts._asdict().items()}
            history.append(losses)
            if not math.isfinite(losses["loss"]):
                raise FloatingPointError(f"the loss is {losses['loss']} at step {len(history)}: lower --learning-rate")
            speed = len(history) * ids.numel() / (time.perf_counter() - started)
            shown = {name: f"{value:.3f}" for name, value in losses.items()}
            progress.set_postfix(shown | {"tokens/s": f"{speed:.0f}"})
            progress.update()
    return history, time.perf_counter() - started


@torch.no_grad()
def evaluate(student: Any, teacher: Any, windows: Tensor, batch_size: int) -> dict[str, float]:
    """Means over every predicted token of `windows` [n, context], at temperature 1, divergence in nats.

    Both models' perplexities, KL(teacher || student), and how often their likeliest tokens agree.
    """
    training = student.training
    student.eval()
    divergence = fastkd.KDLoss(temperature=1.0, soft_weight=1.0, hard_weight=0.0, reduction="none")
    totals = torch.zeros(4, dtype=torch.float64)
    for ids in windows.split(batch_size):
        ids = ids.to(student.device)
        labels = ids[:, 1:]
        student_logits = _logits(student, ids)[:, :-1]
        teacher_logits = _logits(teacher, ids)[:, :-1]
        of_student = fastkd.row_statistics(student_logits, labels)
        of_teacher = fastkd.row_statistics(teacher_logits, labels)
        columns = (
            -of_student.label_logprob,
            -of_teacher.label_logprob,
            divergence(student_logits, teacher_logits),
            of_student.argmax == of_teacher.argmax,
        )
        totals += torch.stack([column.cpu().double().sum() for column in columns])
    student.train(training)
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    student_loss, teacher_loss, kl, agreement = (totals / predicted).tolist()
    return {
        "perplexity": math.exp(student_loss),
        "teacher_perplexity": math.exp(teacher_loss),
        "kl": kl,
        "top1_agreement": agreement,
    }


def _logits(model: Any, ids: Tensor) -> Any:
    """[batch, context, vocabulary]. Without a mask, transformers warns that the eos tokens may be padding."""
    return model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def _sample(model: Any, tokenizer: Any, window: Tensor, seed: int) -> dict[str, str]:
    """What `model` makes of the first tokens of a held-out window [context]."""
    prompt = window[None, : min(PROMPT_TOKENS, len(window) - 1)].to(model.device)
    with torch.random.fork_rng(), torch.no_grad():  # a sample must not move the training's random numbers
        torch.manual_seed(seed)
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_length=min(len(window), prompt.shape[1] + SAMPLE_TOKENS),
            do_sample=True,
            top_p=0.5,
            pad_token_id=tokenizer.eos_token_id,
        )
    text = tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)
    return {"prompt": tokenizer.decode(prompt[0]), "text": text}


def _report(before: dict[str, float], after: dict[str, float], samples: dict[str, dict[str, str]]) -> None:
    print(f"\n{'held-out':<15}{'perplexity':>12}{'KL(teacher||student)':>23}{'top-1 agreement':>18}")
    for name, row in (("student before", before), ("student after", after)):
        print(f"{name:<15}{row['perplexity']:>12,.1f}{row['kl']:>23.3f}{row['top1_agreement']:>18.1%}")
    print(f"{'teacher':<15}{after['teacher_perplexity']:>12,.1f}{0:>23.3f}{1:>18.1%}\n")
    print(f"{'prompt':<15}  {samples['teacher']['prompt']!r}")
    for name, sample in samples.items():
        print(f"{name:<15}  {sample['text']!r}")
    print()


def _loss(options: DistillOptions) -> fastkd.KDLoss:
    try:
        return fastkd.KDLoss(
            temperature=options.temperature,
            soft_weight=options.soft_weight,
            hard_weight=options.hard_weight,
            shift=True,
            return_parts=True,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def _student_config(student: str, teacher_config: Any, tokenizer: Any) -> Any:
    """The student's configuration; vocabulary and special tokens are the teacher's where it does not say."""
    shared = {
        "vocab_size": vocab_size_of(teacher_config),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    path = Path(student)
    if student == SMALL_GPT2 and not path.exists():
        size = {"n_positions": 128, "n_embd": 256, "n_layer": 4, "n_head": 4}
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # too few passes to overfit
        return AutoConfig.for_model("gpt2", **size, **no_dropout, **shared)
    try:
        if path.is_file():
            return AutoConfig.for_model(**(shared | json.loads(path.read_text(encoding="utf-8"))))
        return AutoConfig.from_pretrained(student)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"cannot load the student's configuration {student!r}: {error}\nWays that work: a JSON file with "
            "a model_type, a directory with a config.json, a Hugging Face Hub name (needs the network), or "
            f"'{SMALL_GPT2}'"
        ) from error


def _check_models(teacher: Any, student: Any, tokenizer: Any, context: int) -> None:
    """Refuse configurations whose logits cannot be compared, or that have no room for the windows."""
    vocab_size = vocab_size_of(teacher)
    if vocab_size_of(student) != vocab_size:
        raise InputError(
            f"the student's vocabulary has {vocab_size_of(student)} tokens, the teacher's {vocab_size}: set "
            f"vocab_size to {vocab_size} in the student's configuration (it uses the teacher's tokenizer)"
        )
    check_tokenizer(teacher, tokenizer)
    check_positions("student", student, context)
    check_positions("teacher", teacher, context)


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise InputError(f"the output {output} is a file: name a directory")
    if not output.exists() or not any(output.iterdir()):
        return
    if not overwrite:
        raise InputError(f"the output directory {output} is not empty: name another, or pass --overwrite")
    if not (output / METRICS_FILE).is_file():  # or `--output . --overwrite` would delete someone's work
        raise InputError(f"{output} is no earlier run (it has no {METRICS_FILE}): not overwritten")


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A directory beside `output` to write in: it becomes `output` if the block succeeds, else goes away."""
    output = output.resolve()
    staging = output.with_name(f".{output.name}.{os.getpid()}.partial")
    replaced = output.with_name(f".{output.name}.{os.getpid()}.replaced")
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot write to {output.parent}: {error.strerror}") from error
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging)
        raise
    if output.exists():
        output.rename(replaced)
    staging.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)
