"""The loop that README.md shows to those who have their own trains a student, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from fastkd.training.data import Windows, collate
from tests.training.test_trainer import model, teacher, windows

README = Path(__file__).parents[2] / "README.md"


def test_own_loop(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    found = [block for block in blocks if "optimizer.step()" in block]
    (loop,) = found
    assert len(loop.splitlines()) <= 20
    student, taught = model(0), teacher().requires_grad_(True).train()
    before = torch.cat([weight.detach().flatten() for weight in student.parameters()])
    names = {
        "student": student,
        "teacher": taught,
        "optimizer": torch.optim.AdamW(student.parameters(), lr=1e-2),
        "loader": DataLoader(Windows(windows()), batch_size=8, collate_fn=collate),
    }
    losses = []
    for _ in range(6):
        exec(loop, names)
        losses.append(names["loss"].item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(weight.grad is None for weight in taught.parameters())
    assert not torch.equal(before, torch.cat([weight.detach().flatten() for weight in student.parameters()]))
