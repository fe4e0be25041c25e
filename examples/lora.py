"""A student with LoRA adapters in KDTrainer: only the adapters are trained, on the teacher's predictions.

`"all-linear"` leaves out the output head, which must stay a plain linear layer. Needs peft.
Run it with: python examples/lora.py
"""

from __future__ import annotations

import tempfile

import peft
import tiny
import torch
from transformers import TrainingArguments

import fastkd
from fastkd.training.trainer import KDTrainer


def main(output: str) -> list[float]:
    """Train, and return the losses that were logged."""
    adapters = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    student = peft.get_peft_model(tiny.teacher(steps=20), adapters)  # the base knows the text less well
    student.print_trainable_parameters()
    nothing = torch.tensor([-100])  # no token predicts the first one
    examples = [{"input_ids": ids, "labels": torch.cat((nothing, ids[1:]))} for ids in tiny.windows()]
    arguments = TrainingArguments(
        output, max_steps=60, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=1, save_strategy="no",
        use_cpu=True, report_to="none",
    )  # fmt: skip
    kd = fastkd.KDLoss(temperature=2.0, soft_weight=0.7, hard_weight=0.3)
    trainer = KDTrainer(student, arguments, kd=kd, teacher=tiny.teacher(), train_dataset=examples)
    trainer.train()
    student.save_pretrained(output)  # the adapters alone
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    main(tempfile.mkdtemp())
