"""Teachers of every kind, in a training loop of your own.

`train` is the loop. It is the same whoever teaches. Run it with: python examples/teachers.py
"""

from __future__ import annotations

import tiny
import torch

import fastkd
from fastkd import teachers
from fastkd.terms import Batch, KDTerm, outputs_of

STEPS = 20
NAMES = ["even", "odd"] * len(tiny.windows())  # which teacher each row has


def modes() -> dict[str, teachers.TeacherMode]:
    """One of each kind."""
    teacher, other = tiny.teacher(), tiny.teacher(30)
    return {
        "frozen": teachers.Frozen(teacher),
        "online": teachers.Online(tiny.model(64, seed=1)),
        "mutual": teachers.Mutual(tiny.model(32, seed=1)),
        "ema": teachers.EMA(decay=0.9),
        "snapshot": teachers.Snapshot(every=5),
        "multi_view": teachers.MultiView(["token_dropout", "attention_dropout"]),
        "mixture": teachers.Mixed([teacher, other], weights=[2, 1]),
        "routed": teachers.Routed({"even": teacher, "odd": other}, column="name"),
    }


def train(mode: teachers.TeacherMode, ids: torch.Tensor) -> list[float]:
    """The loss of each step."""
    student, kd, losses = tiny.model(32), KDTerm(fastkd.KDLoss(temperature=2.0)), []
    optimizer = torch.optim.AdamW([*student.parameters(), *mode.trained], lr=1e-2)
    batch = Batch(ids, {"input_ids": ids})
    for step in range(1, STEPS + 1):
        teacher = mode.outputs(student, batch.inputs, {"name": NAMES[: len(ids)]})
        seen = outputs_of(student, batch.inputs)
        loss = kd(seen, teacher, batch)["loss"] + sum(mode.loss(seen, batch).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mode.stepped(student, step)
        losses.append(loss.item())
    return losses


def main() -> list[float]:
    """Train with each of them, and return the mean loss of each step."""
    losses = {name: train(mode, tiny.windows()) for name, mode in modes().items()}
    for name, found in losses.items():
        print(f"{name}: loss {found[0]:.3f}, then {found[-1]:.3f}")
    return [sum(step) / len(losses) for step in zip(*losses.values(), strict=True)]


if __name__ == "__main__":
    main()
