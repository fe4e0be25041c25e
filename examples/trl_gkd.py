"""TRL's GKDTrainer with fastkd's loss: on-policy distillation without tensors of logits.

GKDTrainer generates the student's answers and prepares the batches; the loss is the only method that changes. Its own
loss is at temperature 1, without cross-entropy: so is this one. Needs trl. Run it with: python examples/trl_gkd.py
"""

from __future__ import annotations

import tempfile

import tiny
import torch
from datasets import Dataset
from trl.experimental.gkd import GKDConfig, GKDTrainer

import fastkd


class FusedGKDTrainer(GKDTrainer):
    """GKDTrainer whose generalised Jensen-Shannon divergence is computed from hidden states."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The same value and gradient as GKDTrainer's."""
        if return_outputs:
            raise ValueError("no logits are formed, so there are no outputs to return")
        kd = fastkd.KDLoss(
            1.0, soft_weight=1.0, hard_weight=0.0, divergence=fastkd.JSD(self.beta), scale_t2=False, shift=True
        )
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            taught = fastkd.project(self.teacher_model, **batch)
        return kd(fastkd.project(model, **batch), taught, inputs["labels"], num_items=num_items_in_batch)


def train(output: str, trainer_type: type[GKDTrainer], steps: int) -> list[float]:
    """Train, and return the losses that were logged."""
    chats = [
        [{"role": "user", "content": f"Capital of {country}?"}, {"role": "assistant", "content": f"{capital}."}]
        for country, capital in tiny.CAPITALS.items()
    ]
    arguments = GKDConfig(
        output, max_steps=steps, per_device_train_batch_size=3, learning_rate=1e-2, logging_steps=1, save_strategy="no",
        use_cpu=True, bf16=False, report_to="none", lmbda=0.3, beta=0.5, max_new_tokens=8, max_length=64,
    )  # fmt: skip
    data = Dataset.from_dict({"messages": chats})
    trainer = trainer_type(
        tiny.model(32), tiny.teacher(), arguments, train_dataset=data, processing_class=tiny.tokenizer()
    )
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def main(output: str) -> list[float]:
    """Train with fastkd's loss."""
    return train(output, FusedGKDTrainer, steps=10)


if __name__ == "__main__":
    main(tempfile.mkdtemp())
