"""From `results.json` to what people read: `report.md` and its plots of every machine, and the README's block."""
