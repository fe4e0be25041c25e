"""The teacher runs once. Training reads its predictions from a cache, and needs no teacher in memory.

Rows are found by the content of a sequence, so shuffling is safe. Interrupt the write and run it again: it resumes.
Run it with: python examples/cached.py [DIRECTORY]
"""

from __future__ import annotations

import sys
import tempfile

import tiny
import torch

import fastkd

EPOCHS, BATCH, TEMPERATURE = 10, 8, 2.0


def main(directory: str) -> list[float]:
    """Write the cache, train from it, and return the loss of each step."""
    tokenizer, windows = tiny.tokenizer(), tiny.windows()
    kd = fastkd.KDLoss(temperature=TEMPERATURE, shift=True)
    fastkd.cache.write(tiny.teacher(), windows.split(BATCH), directory, temperature=TEMPERATURE, tokenizer=tokenizer)

    cache = fastkd.cache.open(directory)
    cache.check(tokenizer=tokenizer, loss=kd)
    print(cache, f"{cache.bytes / cache.tokens:.0f} bytes per token")
    student = tiny.model(32)
    examples = [{"input_ids": window} for window in windows]
    loader = torch.utils.data.DataLoader(examples, BATCH, shuffle=True, collate_fn=fastkd.cache.Collator(cache))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    losses = []
    for epoch in range(EPOCHS):
        for batch in loader:
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            optimizer.zero_grad()
            loss = kd(fastkd.project(student, **inputs), batch["teacher"], batch["labels"])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
