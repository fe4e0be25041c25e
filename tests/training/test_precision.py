"""bf16 where nobody asked: on CPUs that gain by it; what was asked wins; the run says what it was."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import yaml

from fastkd import training
from fastkd.kernels.cpu import products
from fastkd.training.configuration import Parser, dump
from fastkd.training.options import GROUPS
from tests.training.conftest import changed, run


@pytest.fixture
def races(monkeypatch):
    """How often it was asked whether bf16 gains; the answer is yes."""
    asked = []

    def gains():
        asked.append(True)
        return True

    monkeypatch.setattr(products, "gains_in_torch", gains)
    return asked


def test_where_it_gains_it_is_taken(options, races, capsys):
    assert training.precision.decided(options).training.bf16 is True
    assert "--bf16 false" in capsys.readouterr().out


def test_where_it_gains_nothing_it_is_not(options, monkeypatch, capsys):
    monkeypatch.setattr(products, "gains_in_torch", lambda: False)
    assert training.precision.decided(options).training.bf16 is False
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "found"), [({"bf16": True}, True), ({"bf16": False}, False), ({"fp16": True}, False)], ids=str
)
def test_what_was_asked_wins_without_a_race(asked, found, options, races):
    assert training.precision.decided(changed(options, **asked)).training.bf16 is found
    assert not races


def test_gpus_are_as_they_were(options, races, monkeypatch):
    monkeypatch.setattr(training.precision, "device_of", lambda models: torch.device("cuda"))
    assert training.precision.decided(options).training.bf16 is False
    assert not races


@pytest.mark.parametrize(
    ("flags", "found"),
    [((), None), (("--bf16",), True), (("--bf16", "true"), True), (("--bf16", "false"), False), (("--bf16=0",), False)],
    ids=str,
)
def test_the_flag(flags, found, tmp_path):
    parser = Parser("distill", "", GROUPS)
    *groups, _ = parser.parse(flags)
    written = tmp_path / "config.yaml"
    written.write_text(dump(groups))
    *again, _ = parser.parse([str(written)])
    for some in (groups, again):
        values = {name: value for group in some for name, value in dataclasses.asdict(group).items()}
        assert values["bf16"] is found


@pytest.mark.parametrize("kept", [True, False])
def test_a_resumed_run_keeps_what_it_was_started_with(options, races, tmp_path, kept):
    begun = changed(options, output=str(tmp_path / "out"), bf16=kept)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text(dump(begun))
    again = changed(begun, bf16=None, resume=True)
    assert training.precision.decided(again).training.bf16 is kept
    assert not races
    assert training.precision.decided(changed(again, resume=False)).training.bf16 is True


def test_a_run_says_what_it_was_trained_in(options, races, tmp_path, monkeypatch):
    trained, arguments = [], training.arguments.arguments

    def recorded(*given, **settings):
        trained.append(arguments(*given, **settings).bf16)
        return arguments(*given, **settings)

    monkeypatch.setattr(training.fit, "arguments", recorded)
    metrics = run(options, max_steps=4, epochs=None, eval_steps=4)
    assert trained == [True]
    assert metrics["options"]["training"]["bf16"] is True
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["options"]["training"]["bf16"] is True
    kept = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert "True" in str([value for key, value in _leaves(kept) if key == "bf16"])


def _leaves(mapping):
    for key, value in mapping.items():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield key, value
