"""From `results.json` to what people read: `report.md` and `speedups.png` of every machine, and the README's block."""
