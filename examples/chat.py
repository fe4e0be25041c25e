"""Chat data: TRL's SFTTrainer prepares it, KDTrainer distils on it. One line joins them.

SFTTrainer applies the chat template and masks the questions; KDTrainer replaces the loss and divides by the answers'
tokens. Needs trl. Run it with: python examples/chat.py
"""

from __future__ import annotations

import tempfile

import tiny
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import fastkd
from fastkd.training.trainer import KDTrainer


class ChatTrainer(KDTrainer, SFTTrainer):
    """Both of them."""


CONVERSATIONS = [
    {
        "prompt": [{"role": "user", "content": f"What is the capital of {country}?"}],
        "completion": [{"role": "assistant", "content": f"The capital of {country} is {capital}."}],
    }
    for country, capital in tiny.CAPITALS.items()
]


def trainer(output: str) -> ChatTrainer:
    """Ready to train."""
    arguments = SFTConfig(
        output, max_steps=12, per_device_train_batch_size=3, learning_rate=1e-2, logging_steps=1, save_strategy="no",
        use_cpu=True, bf16=False, report_to="none", remove_unused_columns=False,
    )  # fmt: skip
    return ChatTrainer(
        tiny.model(32),
        arguments,
        kd=fastkd.KDLoss(temperature=1.0),
        teacher=tiny.teacher(),
        train_dataset=Dataset.from_list(CONVERSATIONS),
        processing_class=tiny.tokenizer(),
    )


def main(output: str) -> list[float]:
    """Train, and return the losses that were logged."""
    ready = trainer(output)
    ready.train()
    return [line["loss"] for line in ready.state.log_history if "loss" in line]


if __name__ == "__main__":
    main(tempfile.mkdtemp())
