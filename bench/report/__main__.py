"""`python -m bench.report`: everything that is generated, of all machines, from their `results.json`."""

from bench.report import files

print("\n".join(files.write_all()))
