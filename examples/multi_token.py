"""Extra heads that learn to predict the tokens after the next one, beside a distillation.

The heads are blocks of the student's own architecture on its last hidden states (Gloeckle et al. 2024). They learn
their tokens, and what the student itself says of these. `KDTrainer` takes the term as one of its `terms`.
Run it with: python examples/multi_token.py
"""

from __future__ import annotations

import tempfile

import tiny
import torch

import fastkd
from fastkd.terms import Batch, KDTerm, outputs_of

STEPS, HEADS = 40, 2


def main() -> list[float]:
    """Train, and return the loss of each step."""
    teacher, student, ids = tiny.teacher(), tiny.model(32), tiny.windows()
    kd = KDTerm(fastkd.KDLoss(temperature=2.0))
    term = fastkd.MultiTokenTerm(fastkd.MultiTokenHeads(student.config, HEADS))
    optimizer = torch.optim.AdamW([*student.parameters(), *term.parameters()], lr=1e-2)
    losses: list[float] = []
    for _ in range(STEPS):
        with torch.no_grad():
            taught = outputs_of(teacher, {"input_ids": ids})
        seen, batch = outputs_of(student, {"input_ids": ids}), Batch(ids, {"input_ids": ids})
        found = term(seen, taught, batch)
        (kd(seen, taught, batch)["loss"] + term.weight * found["loss"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(found["loss"].item())
    print(f"after {STEPS} steps: heads {losses[-1]:.3f}, cross-entropy {found['multi_token_hard'].item():.3f}")
    with tempfile.TemporaryDirectory() as directory:
        student.save_pretrained(directory)  # without the heads, which are dropped unless they are saved too
        term.heads.save_pretrained(directory)
        print(f"kept {len(fastkd.MultiTokenHeads.from_pretrained(directory))} heads beside the student")
    return losses


if __name__ == "__main__":
    main()
