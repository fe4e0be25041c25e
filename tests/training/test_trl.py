"""`KDTrainer` over TRL's SFTTrainer, in one line: its preparation of chats, fastkd's loss."""

from __future__ import annotations

import pytest
import torch
import transformers

import fastkd
from fastkd.training.trainer import KDTrainer
from tests.training.conftest import CONTEXT

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


class K(KDTrainer, trl.SFTTrainer):
    pass


@pytest.fixture
def chats():
    prompts, answers = ["the film was", "two old friends"], ["a slow story", "lost their way home"]
    return datasets.Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": text}] for text in prompts],
            "completion": [[{"role": "assistant", "content": text}] for text in answers],
        }
    )


@pytest.fixture
def tokenizer(inputs):
    found = transformers.AutoTokenizer.from_pretrained(inputs / "teacher")
    found.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    found.pad_token = found.eos_token
    return found


def made(inputs, tmp_path, tokenizer, chats, kind=K, **options):
    arguments = trl.SFTConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        max_grad_norm=0.0,
        optim="sgd",
        lr_scheduler_type="constant",
        max_length=CONTEXT,
        remove_unused_columns=False,
        disable_tqdm=True,
        **options,
    )
    teacher = transformers.AutoModelForCausalLM.from_pretrained(inputs / "teacher")
    torch.manual_seed(1)
    student = transformers.AutoModelForCausalLM.from_config(teacher.config)
    found = kind(
        student,
        arguments,
        kd=fastkd.KDLoss(2.0),
        teacher=teacher.eval().requires_grad_(False),
        train_dataset=chats,
        processing_class=tokenizer,
    )
    return found, teacher


def test_chats_are_distilled_in_one_line(inputs, tmp_path, tokenizer, chats):
    """A step is the gradient of the loss on the answers' tokens, which TRL has marked."""
    found, teacher = made(inputs, tmp_path, tokenizer, chats)
    student = found.model
    twin = type(student)(student.config)
    twin.load_state_dict(student.state_dict())
    batch = next(iter(found.get_train_dataloader()))
    assert 0 < (batch["labels"] != -100).sum() < batch["labels"].numel()
    found.train()

    batch = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    labels = batch.pop("labels")
    kd = fastkd.KDLoss(2.0, shift=True, return_parts=True)
    parts = kd(twin(**batch).logits, teacher(**batch).logits, labels)
    parts.loss.backward()
    with torch.no_grad():
        for weight in twin.parameters():
            weight -= 1e-2 * weight.grad
    for ours, theirs in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    line = found.state.log_history[0]
    assert [line[name] for name in ("soft", "hard")] == pytest.approx([parts.soft.item(), parts.hard.item()], rel=1e-5)


def test_another_loss_of_trl_is_refused(inputs, tmp_path, tokenizer, chats):
    with pytest.raises(ValueError, match="KDTrainer cannot use loss_type='dft'"):
        made(inputs, tmp_path, tokenizer, chats, loss_type="dft")
