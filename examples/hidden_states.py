"""From hidden states: no tensor of logits is formed, of the student or of the teacher.

`fastkd.project` runs a model without its output head. The loss computes the logits of some tokens at a time, within
`memory_budget` bytes. Each step accumulates two batches; `num_items` makes their sum the mean over the step's tokens.
Run it with: python examples/hidden_states.py
"""

from __future__ import annotations

import tiny
import torch

import fastkd

EPOCHS, BATCH, BUDGET = 10, 4, 4 << 20


def main() -> list[float]:
    """Train, and return the loss of each step."""
    teacher, student, windows = tiny.teacher(), tiny.model(32), tiny.windows()
    kd = fastkd.KDLoss(temperature=2.0, divergence=fastkd.JSD(beta=0.3), shift=True, memory_budget=BUDGET)
    print(fastkd.plan(BATCH * 32, 258, 32, 64, memory_budget=BUDGET, divergence=kd.divergence))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    losses = []
    for epoch in range(EPOCHS):
        for step in windows[torch.randperm(len(windows))].split(2 * BATCH):
            count, total = step[:, 1:].numel(), 0.0  # the first token of a row is predicted by nothing
            for ids in step.split(BATCH):
                with torch.no_grad():
                    teacher_logits = fastkd.project(teacher, input_ids=ids)
                loss = kd(fastkd.project(student, input_ids=ids), teacher_logits, labels=ids, num_items=count)
                loss.backward()
                total += loss.item()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
        print(f"epoch {epoch}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
