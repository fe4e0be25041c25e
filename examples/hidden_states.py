"""The same loop from hidden states: no tensor of logits is formed, of the student or of the teacher.

`fastkd.project` runs a model without its output head. The loss computes the logits of some tokens at a time, within
`memory_budget` bytes. Run it with: python examples/hidden_states.py
"""

from __future__ import annotations

import tiny
import torch

import fastkd

STEPS, BATCH, BUDGET = 40, 8, 4 << 20


def main() -> list[float]:
    """Train, and return the loss of each step."""
    teacher, student = tiny.teacher(), tiny.model(32)
    loader = torch.utils.data.DataLoader(tiny.windows(), BATCH, shuffle=True, drop_last=True)
    kd = fastkd.KDLoss(temperature=2.0, divergence=fastkd.JSD(beta=0.3), shift=True, memory_budget=BUDGET)
    print(fastkd.plan(BATCH * 32, 258, 32, 64, memory_budget=BUDGET, divergence=kd.divergence))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    losses: list[float] = []
    while len(losses) < STEPS:
        for ids in loader:
            with torch.no_grad():
                teacher_logits = fastkd.project(teacher, input_ids=ids)
            loss = kd(fastkd.project(student, input_ids=ids), teacher_logits, labels=ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(f"step {len(losses)}: loss {loss:.3f}")
    return losses


if __name__ == "__main__":
    main()
