"""Several teachers at once, mixed in probability space: p = Σ wᵢ·softmax(zᵢ / T).

No logits of any model are formed for more than some tokens at a time, and no probabilities.
Run it with: python examples/mixture.py
"""

from __future__ import annotations

import tiny
import torch

import fastkd

EPOCHS, BATCH, WEIGHTS = 10, 8, [0.3, 0.7]


def main() -> list[float]:
    """Train, and return the loss of each step."""
    teachers, student, windows = [tiny.teacher(steps=20), tiny.teacher(steps=60)], tiny.model(32), tiny.windows()
    kd = fastkd.KDLoss(temperature=2.0, shift=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    losses = []
    for epoch in range(EPOCHS):
        for ids in windows[torch.randperm(len(windows))].split(BATCH):
            with torch.no_grad():
                mixture = fastkd.Mixture([fastkd.project(teacher, input_ids=ids) for teacher in teachers], WEIGHTS)
            loss = kd(fastkd.project(student, input_ids=ids), mixture, labels=ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
