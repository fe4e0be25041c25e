"""The commands of `fastkd`, one file each: its help, its options, its run.

The module of a command is named as the command is, with underscores, and has a function `run` of its arguments. The
list of commands is in `fastkd/cli.py`. Modules here import others as `from fastkd import training`, which loads them
when they are first used: help and refused options need not wait for transformers' Trainer.
"""
