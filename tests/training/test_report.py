"""The report shows the user's text as it is, and costs nobody a student."""

from __future__ import annotations

import csv
import json
import shlex
from io import BytesIO

import pytest
import transformers

from fastkd.cli import main
from fastkd.training import plots, report
from fastkd.training.options import METRICS
from fastkd.training.plain import figure_text, markdown, visible
from fastkd.training.report_tables import MEASURES
from tests.training.conftest import run

HOSTILE = [
    r"the $\begin{film}$",
    "two $x^{$ friends",
    "<script>alert(1)</script> home",
    "snow \x1b[31m\x00\u202e way",
    r"\$ `lost` *in* [snow](x)",
]


def test_any_prompt_is_reported(options, tmp_path, capsys):
    run(options, prompts=HOSTILE, max_steps=2)
    shown = capsys.readouterr()
    assert "warning" not in shown.err
    page, story = ((tmp_path / "out" / name).read_text() for name in ("report.html", "samples.md"))
    assert page.count("<svg") == 5 + len(HOSTILE) + 2
    assert "<script" not in page + story.replace(r"\<", "")
    assert not set(page + story + shown.out) & {"\x1b", "\x00", "\u202e"}
    assert r"## the \$\\begin{film}\$" in story


def test_intervals_are_in_every_file(options, tmp_path):
    metrics = run(options, max_steps=2, ce_baseline=True, out_of_domain=options.data.data)
    out = tmp_path / "out"
    rows = list(csv.DictReader((out / "results.csv").open()))
    ends = [f"{name}_{end}" for name in ("perplexity", "kl", "out_of_domain_perplexity") for end in ("low", "high")]
    assert list(rows[0]) == ["model", "parameters", *METRICS, *ends]  # new columns stand last
    page = (out / "report.html").read_text()
    for row in rows:
        found = metrics["models"][row["model"]]
        for name, (lower, upper) in found["intervals"].items():
            assert [float(row[f"{name}_low"]), float(row[f"{name}_high"])] == [lower, upper]
            exact = (row["model"], name) == ("teacher", "kl")
            assert lower == found[name] == upper == 0 if exact else lower < found[name] < upper
            assert exact or f"<small>{MEASURES[name].form(lower)} to {MEASURES[name].form(upper)}</small>" in page
        windows = metrics["models"]["teacher"]["held_out"]["windows"]
        assert (found["held_out"]["windows"], found["held_out"]["tokens"]) == (windows, 15 * windows)
    student, alone = metrics["models"]["student"], metrics["models"]["CE-only student"]
    gained = metrics["differences"]["CE-only student"]["perplexity"]
    assert gained["difference"] == student["perplexity"] - alone["perplexity"]
    lower, upper = gained["interval"]
    assert lower <= gained["difference"] <= upper
    assert upper - lower < sum(high - low for low, high in (one["intervals"]["perplexity"] for one in (student, alone)))


@pytest.mark.parametrize("text", [*HOSTILE, "$", "$$", r"\$", r"a\\$b$", "\ud800", "a\nb", ""])
def test_a_figure_shows_any_text_as_it_is(text):
    figure = plots.temperatures({1.0: [0.5, 0.5]}, [text, "b"], text)
    axes = figure.axes[0]
    title, tick = axes.title, axes.get_xticklabels()[0]
    figure.savefig(BytesIO(), format="png")
    seen = visible(text).replace("\n", "⏎")
    assert title._preprocess_math(title.get_text()) == (seen, False)
    assert tick._preprocess_math(tick.get_text()) == (seen.replace(" ", "␣") or "∅", False)


def test_long_text_is_shortened_in_figures_and_markdown_is_one_line():
    assert len(figure_text("a" * 5000)) == 80
    assert markdown("# a\n- b <i>") == r"\# a - b \<i\>"
    assert visible("é 中 😀\u00a0\n\t") == "é 中 😀\u00a0\n\t"
    assert visible("\r\x1b\ud800") == r"\r\x1b\ud800"


def test_a_figure_that_fails_costs_only_itself(options, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no ink\x1b")

    monkeypatch.setattr(plots, "calibration", fail)
    run(options, max_steps=2)
    warned = capsys.readouterr().err
    assert r"the figure of calibration could not be made: RuntimeError: no ink\x1b" in warned
    assert shlex.join(["fastkd", "eval", str(tmp_path / "out")]) in warned
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 5 + 2 + 1
    assert "no ink" in page


def test_a_report_that_fails_costs_no_student(options, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise ValueError("no paper")

    with monkeypatch.context() as patched:
        patched.setattr(report, "page", fail)
        patched.setattr(report, "_samples", fail)
        metrics = run(options, max_steps=2)
    out = tmp_path / "out"
    warned = capsys.readouterr().err
    assert "report.html could not be made: ValueError: no paper" in warned
    assert "samples.md could not be made" in warned
    assert not (out / "report.html").exists()
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert len(list(csv.DictReader((out / "results.csv").open()))) == 2
    transformers.AutoModelForCausalLM.from_pretrained(out)
    assert json.loads((out / "run.json").read_text())["finished"]
    assert main(["eval", str(out)]) == 0  # as the warning says
    assert (out / "eval" / "report.html").exists()


def test_judging_that_fails_after_training_costs_no_student(options, tmp_path, monkeypatch):
    from fastkd.training import judge

    def fail(*_):
        raise RuntimeError("no verdict")

    with monkeypatch.context() as patched:
        patched.setattr(judge, "verdict", fail)
        with pytest.raises(RuntimeError, match="no verdict"):
            run(options, max_steps=2)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    run(options, max_steps=2, resume=True)
    assert (tmp_path / "out" / "report.html").exists()


def test_a_sweep_keeps_its_rows_without_the_figure(options, inputs, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no ink")

    monkeypatch.setattr(plots, "sweep", fail)
    run(options, max_steps=2)
    arguments = ["sweep", str(tmp_path / "out" / "config.yaml"), "--output", str(tmp_path / "sweep")]
    assert main([*arguments, "--alpha", "0.5", "--temperature", "1"]) == 0
    assert "sweep.png could not be made" in capsys.readouterr().err
    assert len(list(csv.DictReader((tmp_path / "sweep" / "results.csv").open()))) == 1
