"""Beyond the logits: the student learns the teacher's hidden states, and where its attention looks.

Terms are addends of the loss. `check` looks at both models before the optimizer is made, and makes what depends on
both: here a projector from the student's width to the teacher's. `outputs_of` runs a model once for all terms.
Run it with: python examples/features.py
"""

from __future__ import annotations

import tiny
import torch

import fastkd
from fastkd.terms import AttentionTerm, Batch, HiddenStateTerm, KDTerm, Terms, outputs_of

EPOCHS = 10


def main() -> list[float]:
    """Train, and return the loss of each step."""
    teacher, student, windows = tiny.teacher(), tiny.model(32), tiny.windows()
    terms = Terms([KDTerm(fastkd.KDLoss(2.0)), HiddenStateTerm(weight=0.5), AttentionTerm(relation="qk", weight=0.1)])
    terms.check(student, teacher)
    optimizer = torch.optim.AdamW([*student.parameters(), *terms.parameters()], lr=1e-2)
    losses = []
    for epoch in range(EPOCHS):
        for ids in windows[torch.randperm(len(windows))].split(8):
            inputs = {"input_ids": ids}
            with torch.no_grad():
                theirs = outputs_of(teacher, inputs, terms.teachers_needs)
            loss = terms(outputs_of(student, inputs, terms.students_needs), theirs, Batch(labels=ids, inputs=inputs))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        steps = len(losses) // (epoch + 1)
        means = {name: round(one.item() / steps, 3) for name, one in terms.take_sums().items()}
        print(f"epoch {epoch}: loss {losses[-1]:.3f}, {means}")
    return losses


if __name__ == "__main__":
    main()
