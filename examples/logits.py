"""A training loop of your own, on logits.

The models return logits, as they always do; one line makes the loss. `shift=True` scores the logits at position i
against the token at i + 1. Run it with: python examples/logits.py
"""

from __future__ import annotations

import tiny
import torch

import fastkd

STEPS, BATCH = 40, 8


def main() -> list[float]:
    """Train, and return the loss of each step."""
    teacher, student = tiny.teacher(), tiny.model(32)
    loader = torch.utils.data.DataLoader(tiny.windows(), BATCH, shuffle=True, drop_last=True)
    kd = fastkd.KDLoss(temperature=2.0, soft_weight=0.5, hard_weight=0.5, shift=True, return_parts=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    losses: list[float] = []
    while len(losses) < STEPS:
        for ids in loader:
            with torch.no_grad():
                teacher_logits = teacher(ids).logits
            loss, soft, hard = kd(student(ids).logits, teacher_logits, labels=ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(f"step {len(losses)}: loss {loss:.3f}, soft {soft:.3f}, hard {hard:.3f}")
    return losses


if __name__ == "__main__":
    main()
