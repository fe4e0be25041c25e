"""Options from flags and a YAML file: one parser for both, so that a key is checked as its flag is.

    fastkd distill config.yaml --temperature 3

A YAML file is turned into flags that come before those of the command line, which therefore win. Needs transformers'
argument parser, which loads neither torch nor its models.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers.hf_argparser import HfArgumentParser

from fastkd.training.options import GROUPS, InputError, at_home, did_you_mean
from fastkd.training.options.data import weighted
from fastkd.training.options.progressive import as_texts
from fastkd.training.options.teaching import unfolded

__all__ = ["Parser", "differences", "dump", "dump_over", "load"]

#: Options that exclude each other: one on the command line drops the others of a YAML file.
_RIVALS = (
    {"epochs", "max_steps"},
    {"alpha", "alpha_on", "soft_weight", "hard_weight"},
    {"student", "student_layers"},
    {"student", "student_width"},
)

#: The same of options that are resolved, among which there is no alpha any more.
_EXCLUDED = {
    "epochs": ("max_steps",),
    "max_steps": ("epochs",),
    "alpha": ("soft_weight", "hard_weight"),
    "student": ("student_layers", "student_width"),
    "student_layers": ("student",),
    "student_width": ("student",),
}

#: Options that a file may give with mappings, which flags cannot: name → what makes of them values of options.
#: A group that reads one of them in another way has it in a table `unfolds` of its own.
_UNFOLDED = {"mix_data": weighted, "stages": as_texts, "terms": unfolded}

_LEVELS = 2  # of mappings around an option: its group, and one around the groups
_SUFFIXES = (".yaml", ".yml")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions; shows defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "", []) else super()._get_help_string(action)


class Parser:
    """The arguments of one command: dataclasses, a YAML file for them, and what else a command adds to `.add`."""

    def __init__(self, command: str, description: str, groups: Sequence[Any], *, config: bool = True) -> None:
        self.groups = groups
        self._parser = _Refusing(
            list(groups),
            prog=f"fastkd {command}",
            usage="%(prog)s [CONFIG.yaml] [--option VALUE ...]" if config else None,
            description=description,
            formatter_class=_HelpFormatter,
        )
        self.add = self._parser.add_argument
        self._keys, self._elsewhere = _keys(groups), _keys(GROUPS)
        self._unfolded = dict(_UNFOLDED)
        for group in groups:
            self._unfolded |= getattr(group, "unfolds", {})
        self._lists = {
            one.name
            for group in groups
            for one in fields(group)
            if isinstance(self._parser.get_default(one.name), list)
        }
        if config:
            self.add("config", nargs="?", metavar="CONFIG.yaml", help="options, by name; flags win over them")
            self.add("--print-config", action="store_true", help="print the resolved options as YAML and stop")

    def named(self, arguments: Sequence[str]) -> Any:
        """The namespace of the arguments alone, nothing checked: what stands where is known before any file is read."""
        return self._parser.parse_known_args(list(arguments))[0]

    def parse(self, arguments: Sequence[str], config: str | None = None) -> tuple[Any, ...]:
        """An object per group, then the namespace of what else was added.

        `config` is a YAML file to start from. Raises InputError for what cannot be read, is unknown or contradicts
        itself; prints and exits for --help.
        """
        named, unknown = self._parser.parse_known_args(list(arguments))
        if unknown:
            meant = "".join(did_you_mean(flag, self._parser.options) for flag in unknown if flag.startswith("--"))
            self._parser.error(f"there are no options {' '.join(unknown)}{meant}")
        if hasattr(named, "config") and named.config is None:
            self._check_swallowed(vars(named))
        config = config or getattr(named, "config", None)
        config = None if config is None else at_home(config, "CONFIG.yaml")
        given = {name for name, value in vars(named).items() if value != self._parser.get_default(name)}
        flags = [] if config is None else self._flags(load(config), config, overridden=given)
        first = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
        # A list at the end of the file's flags would take what stands first on the command line for its values.
        merged = [*first, *flags, *arguments[len(first) :]]
        return self._parser.parse_args_into_dataclasses(merged, look_for_args_file=False)

    def names(self, mapping: dict[Any, Any]) -> set[str]:
        """The options that a mapping gives, by the names of their fields, whatever it calls them."""
        given = (_plain(key) for key, _ in self._leaves(mapping, "the mapping"))
        return {self._keys[key] for key in given if key in self._keys}

    def parse_over(self, groups: Sequence[Any], mapping: dict[Any, Any], where: str) -> tuple[Any, ...]:
        """The groups with the options of a mapping, as a file has them, in the place of theirs.

        What an option excludes goes with it: `max_steps` takes the place of `epochs`. None stands for the default.
        Raises InputError, which calls the mapping `where`, as `parse` does.
        """
        flags, named = self._flags(mapping, where, set()), self.names(mapping)
        dropped = named.union(*(_EXCLUDED.get(name, ()) for name in named))
        base = {name: value for group in groups for name, value in asdict(group).items() if name not in dropped}
        merged = [*self._flags(base, where, set()), *flags]
        return tuple(self._parser.parse_args_into_dataclasses(merged, look_for_args_file=False))[: len(self.groups)]

    def _flags(self, mapping: dict[Any, Any], config: str, overridden: set[str]) -> list[str]:
        flags: list[str] = []
        rivals = {name for rivals in _RIVALS if rivals & overridden for name in rivals}
        overridden = rivals | overridden & _UNFOLDED.keys()  # with what such an option says of others
        seen: dict[str, str] = {}
        for key, value in self._leaves(mapping, config):
            name = self._keys.get(_plain(key))
            if name is None and _plain(key) in self._elsewhere:
                continue  # a run's configuration serves commands that need less of it
            if name is None:
                meant = did_you_mean(str(key), {**self._keys, **self._elsewhere})
                raise InputError(f"{config} has an unknown key {key!r}{meant} (fastkd distill --print-config has all)")
            if name in seen:
                raise InputError(f"{config} has both {seen[name]!r} and {key!r}, which are one option: keep one")
            seen[name] = str(key)
            if value is None or value == [] or name in overridden:
                continue
            if name in self._unfolded:
                said = self._unfolded[name](value)
                value = said.pop(name)
                for other, values in said.items():
                    if other in seen:
                        raise InputError(f"{config} has both weights under {key!r} and {seen[other]!r}: keep one")
                    seen[other] = f"{key} with weights"
                    flags += _flag(other, values)
            if isinstance(value, list) and name not in self._lists:
                raise InputError(f"{config} has the list {value!r} under {key!r}, which takes one value")
            values = value if isinstance(value, list) else [value]
            if any(isinstance(one, (dict, list)) for one in values):
                raise InputError(
                    f"{config} has {value!r} under {key!r}: a value is a text, a number, or a list of them"
                )
            flags += _flag(name, values)
        return flags

    def _leaves(self, mapping: dict[Any, Any], config: str, depth: int = 0) -> Iterator[tuple[Any, Any]]:
        """Keys and values; those of groups too, whose own names say nothing. Groups may stand in one wrapping."""
        for key, value in mapping.items():
            known = {_plain(key)} & (self._keys.keys() | self._elsewhere.keys())
            if known or not isinstance(value, dict):
                yield key, value
            elif depth == _LEVELS:
                raise InputError(f"{config} nests {key!r} too deep: options stand in groups, these in one mapping")
            else:
                yield from self._leaves(value, config, depth + 1)

    def _check_swallowed(self, named: dict[str, Any]) -> None:
        """Options that take several values take a file that follows them too: no text ends like one by chance."""
        for name in self._lists & named.keys():
            found = [text for text in named[name] if str(text).endswith(_SUFFIXES)]
            if found:
                raise InputError(f"--{name} has taken {found[-1]!r} for one of its values: write CONFIG.yaml first")


class _Refusing(HfArgumentParser):
    @property
    def options(self) -> Iterable[str]:
        """Every flag."""
        return self._option_string_actions.keys()

    def error(self, message: str) -> NoReturn:
        first = "; write CONFIG.yaml before the options" if any(end in message for end in _SUFFIXES) else ""
        raise InputError(f"{message}{first}; see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(str(value), map(str, action.choices or ()))
            raise


def _plain(key: object) -> str:
    return str(key).replace("-", "_")


def _flag(name: str, values: Sequence[Any]) -> list[str]:
    if len(values) == 1:
        return [f"--{name}={values[0]}"]  # with =, so that a value may begin with a dash
    return [f"--{name}", *(str(value) for value in values)]


def _keys(groups: Iterable[Any]) -> dict[str, str]:
    """Every accepted spelling, with underscores → the option's name."""
    keys: dict[str, str] = {}
    for group in groups:
        for option in fields(group):
            keys[option.name] = option.name
            for alias in option.metadata.get("aliases", ()):
                keys[alias.lstrip("-").replace("-", "_")] = option.name
    return keys


def load(path: str | Path) -> dict[Any, Any]:
    """The mapping in a YAML file. Raises InputError for anything else."""
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a date that is none
        raise InputError(f"{path} is not YAML: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} must hold keys and values, such as 'temperature: 2', not {type(found).__name__}")
    return found


def dump(groups: Iterable[Any]) -> str:
    """YAML of all options, as `Parser` reads it."""
    return "".join(map(_text, map(asdict, groups)))


def dump_over(path: str | Path, **values: Any) -> str:
    """YAML of the options in a file, as `dump` wrote it, with other values of some."""
    return _text(load(path) | values)


def _text(mapping: dict[Any, Any]) -> str:
    return str(yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True))


def differences(earlier: dict[str, Any], groups: Iterable[Any], ignored: Iterable[str]) -> list[str]:
    """The options whose values are not those of an earlier configuration, as `name: old → new`."""
    now = {name: value for group in groups for name, value in asdict(group).items()}
    names = [name for name in now if name not in ignored and earlier.get(name) != now[name]]
    return [f"{name}: {earlier.get(name)} → {now[name]}" for name in names]
