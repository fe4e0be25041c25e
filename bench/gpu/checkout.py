"""`import fastkd` from a checkout that nobody installed, where `fastkd.kernels` is the folder `kernels` beside it."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from types import ModuleType

__all__ = ["ROOT", "make_importable"]

ROOT = pathlib.Path(__file__).parents[2]


class _Checkout(MetaPathFinder):
    """Finds this checkout's fastkd, whatever is installed, and its `fastkd.kernels`, which is a folder beside it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "fastkd":
            folder = ROOT / "fastkd"
            return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        if name != "fastkd.kernels":
            return None
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(ROOT / "kernels")]
        return spec


def make_importable() -> None:
    """From here on fastkd is this checkout's, unless another was imported before."""
    if "fastkd" in sys.modules:
        return
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    sys.meta_path.insert(0, _Checkout())
