"""Where things may be: imports point downwards, in no circle, and a file has one subject of a length one can read."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
#: From the bottom. A file may import its own layer and those before it; the longest name that fits decides.
LAYERS = [
    (
        "fastkd.arguments",
        "fastkd.rows",
        "fastkd.overlap",
        "fastkd.live",
        "fastkd.sequences",
        "fastkd.gathered",
        "fastkd.itemized",
        "fastkd.processes",
    ),
    ("fastkd.divergences",),
    (
        "fastkd.projected",
        "fastkd.mixture",
        "fastkd.shards",
        "fastkd.sources",
        "fastkd.served",
        "fastkd.kernels",
        "fastkd.reference",
    ),
    ("fastkd.sparse", "fastkd.call", "fastkd.backend"),
    ("fastkd.ranks", "fastkd.agreement"),
    ("fastkd.gradients", "fastkd.projection"),
    ("fastkd.ops",),
    ("fastkd.autograd",),
    ("fastkd.at_once", "fastkd.placed"),
    ("fastkd.losses", "fastkd.statistics"),
    ("fastkd.students",),
    ("fastkd.terms",),
    ("fastkd.teachers",),
    ("fastkd",),
    ("fastkd.cache",),
    ("fastkd.training",),
    ("fastkd.cli",),
    ("fastkd.__main__",),
]
#: Imported where they are used: a fastkd without them does all else. `pydoc_data` is half a megabyte of text.
OPTIONAL = {"triton", "datasets", "peft", "torchao", "gguf", "transformers", "safetensors", "pydoc_data"}
LONGEST_FILE = 450


def module_of(path: pathlib.Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "fastkd")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for folder in ("fastkd", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))}


def layer_of(module: str) -> int:
    fits = [
        (len(name), number)
        for number, names in enumerate(LAYERS)
        for name in names
        if module == name or (name != "fastkd" and module.startswith(f"{name}."))
    ]
    assert fits, f"{module} has no layer"
    return max(fits)[1]


def imports_of(module: str, inside_functions: bool) -> Iterator[str]:
    """What a file imports: modules of the project by their whole names, others too."""
    tree = ast.parse(FILES[module].read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if (id(node) in inside) != inside_functions:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                yield whole if whole in FILES else node.module


@pytest.mark.parametrize("module", FILES)
def test_imports_point_downwards(module: str) -> None:
    higher = {
        name
        for name in imports_of(module, inside_functions=False)
        if name in FILES and name != "fastkd" and layer_of(name) > layer_of(module)
    }
    assert not higher, f"{module} imports {sorted(higher)}, which are above it"


def test_no_import_goes_round() -> None:
    graph = {
        module: {name for name in imports_of(module, inside_functions=False) if name in FILES and name != module}
        for module in FILES
    }
    # `from fastkd import x` of another file is an import of x, or of what the package itself offers to those above it.
    for module in graph:
        if layer_of(module) <= layer_of("fastkd"):
            assert module == "fastkd" or "fastkd" not in graph[module], f"{module} imports the package it is a part of"
    while ready := {module for module, needs in graph.items() if not needs & graph.keys()}:
        graph = {module: needs for module, needs in graph.items() if module not in ready}
    assert not graph, f"these import each other: {sorted(graph)}"


@pytest.mark.parametrize("module", FILES)
def test_only_what_needs_an_optional_package_is_imported_late(module: str) -> None:
    for name in imports_of(module, inside_functions=True):
        needs = set(imports_of(name, inside_functions=False)) if name in FILES else {name}
        packages = {need.partition(".")[0] for need in needs}
        assert packages & OPTIONAL, f"{module} imports {name} inside a function, which needs no optional package"


@pytest.mark.parametrize("module", FILES)
def test_files_fit_in_a_head(module: str) -> None:
    assert len(FILES[module].read_text().splitlines()) <= LONGEST_FILE
