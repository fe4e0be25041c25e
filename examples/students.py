"""A student made of its teacher: half as wide, of the channels, heads and neurons that are most active on the text.

It begins with what the teacher knows; distillation repairs what the cut has broken. Blocks are left out likewise,
by `fastkd.students.keep_layers(teacher, "every:2")`, and both can be combined.
Run it with: python examples/students.py
"""

from __future__ import annotations

import tiny
import torch

import fastkd

STEPS, BATCH = 40, 8


def main() -> list[float]:
    """Train, and return the loss of each step."""
    teacher, windows = tiny.teacher(), tiny.windows()
    kd = fastkd.KDLoss(shift=True)
    losses = []

    student = fastkd.students.narrow(teacher, 32, [{"input_ids": windows}]).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    for step in range(STEPS):
        ids = windows[torch.randperm(len(windows))[:BATCH]]
        loss = kd(fastkd.project(student, input_ids=ids), fastkd.project(teacher, input_ids=ids), labels=ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
