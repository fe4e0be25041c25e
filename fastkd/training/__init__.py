"""Distillation runs built on the loss: what can be asked, the text, the training, the report.

Modules are loaded when they are first named: after `from fastkd import training`, `training.fit.fit(...)` loads
`fastkd.training.fit`. The command line answers a question for help in two seconds because of it, where transformers'
Trainer takes eight to load. `__init__.pyi` lists the modules, for type checkers.
"""

import importlib
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    """The module of that name. Raises AttributeError where there is none."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":  # it is there, but not what it needs
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
