"""Distillation runs built on the loss: what can be asked, the text, the run.

Nothing is imported here, so that the command line can answer without transformers.
"""
