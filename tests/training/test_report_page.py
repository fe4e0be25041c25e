"""The page of a report: columns are defined, goals are marked, figures stand side by side, nothing is from outside."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from matplotlib.figure import Figure

from fastkd.training import plots, report_page
from fastkd.training.evaluation import BINS, Finding, Measures, WindowSums
from fastkd.training.fit import Fitted
from fastkd.training.inline_svg import inline_svg
from fastkd.training.judge import CE_ONLY, STUDENT, TEACHER, Contender, TaskResult, differences
from fastkd.training.options import GROUPS, METRICS, EvaluationOptions, Options
from fastkd.training.report_tables import MEASURES, Column, Table, comparison, results

VOCAB, PROMPTS = 30, ["the old film", '--></svg><script>alert(1)</script> $x^{$ id="a"']


def contender(name, likeliest, loss, kl):
    """One that holds the tokens of `likeliest` so, first to last, after every prompt."""
    logits = torch.zeros(VOCAB)
    logits[likeliest] = torch.arange(len(likeliest) + 1.0, 1.0, -1.0)
    sums = WindowSums(torch.full((4,), 10.0), 10 * torch.tensor(loss), 10 * torch.tensor(kl))
    bins = [[1 / BINS, (number + 0.5) / BINS, number / BINS] for number in range(BINS)]
    mean = sum(loss) / 4
    held_out = Measures(mean, 0.05, bins, sums, sum(kl) / 4, 0.5, 0.25, 0.75)
    intervals = {"perplexity": [12.25, 34.5], "out_of_domain_perplexity": None, "kl": [0.125, 0.5]}
    if name == TEACHER:
        intervals["kl"] = [0.0, 0.0]
    return Contender(name, 12345, held_out, None, 42.0, ["and so on", "<b>"], [logits, logits], intervals)


TEACHER_ONE = contender(TEACHER, [3, 4, 5, 6, 7, 8, 9], [1.0, 2.0, 3.0, 4.0], [0.0] * 4)
STUDENT_ONE = contender(STUDENT, [20, 3, 21, 4, 22, 5, 23], [1.5, 2.5, 3.5, 4.5], [0.5, 0.4, 0.3, 0.2])
ALONE = contender(CE_ONLY, [3, 4, 5, 6, 7, 25, 26], [1.75, 2.5, 3.75, 4.5], [0.75, 0.75, 0.5, 0.5])
CONTENDERS = [TEACHER_ONE, STUDENT_ONE, ALONE]


def fitted(**more):
    line = {"loss": 2.0, "hard": 3.0, "soft": 1.0, "ratio": 3.0, "learning_rate": 1e-3, "grad_norm": 2.0}
    lines = [{**line, "tokens_per_second": 99.0, "step": step, **more} for step in range(1, 4)]
    return Fitted([*lines, {"eval_hard": 2.0, "eval_perplexity": 7.4, "step": 3}], 12345, 3, 384, [])


def record(contenders=CONTENDERS):
    training = {"steps": 3, "tokens": 384, "seconds": 4.5, "tokens_per_second": 85.3}
    return {
        "machine": {"system": "Linux x86_64", "processor": "A & B <CPU>", "cores": 2, "threads": 1, "device": "cpu"},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "seconds": {"cache": 12.0, "student": 4.5, "total": 1234.5},
        "training": {STUDENT: training, CE_ONLY: training},
        "differences": differences(contenders, 0),
    }


@functools.cache
def usual():
    """The page of a run with everything in it."""
    return made(lines=["1 < 2 & <b>"])


def made(fits=None, lines=(), found=None, prompts=PROMPTS, contenders=CONTENDERS):
    options = Options(*(group() for group in GROUPS))._replace(evaluation=EvaluationOptions(prompts=prompts))
    fits = {STUDENT: fitted(), CE_ONLY: fitted(ratio=float("inf"), soft=0.0)} if fits is None else fits
    undrawn = []
    found = record(contenders) if found is None else found
    page = report_page.page("t <i>", contenders, fits, lines, options, lambda token: f" t{token}", found, undrawn)
    assert undrawn == []
    return page


class Outline(HTMLParser):
    """What a page holds: tables as (headers, defined terms), ids, tags, texts, and what stands open at the end."""

    def __init__(self, page):
        super().__init__()
        self.tables, self.ids, self.tags, self.open, self.references = [], [], [], [], []
        self.texts, self.boxes = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        for value in values.values():
            self.references += re.findall(r"url\(#([^)]*)\)", value or "")
        self.references += [values["href"].removeprefix("#")] if "href" in values else []
        if tag == "table":
            self.tables.append(([], {}))
            self.boxes.append([kept.get("class") for _, kept in self.open])
        if tag not in ("meta", "br"):
            self.open.append((tag, values))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        path = [tag for tag, _ in self.open]
        self.texts.append((path, data))
        if path[-1:] == ["th"]:
            self.tables[-1][0].append(data)
        if path[-1:] == ["dt"] and self.open[-2][1].get("class") == "columns":
            self.tables[-1][1][data] = ""
            self.term = data
        if path[-1:] == ["dd"] and self.open[-2][1].get("class") == "columns":
            self.tables[-1][1][self.term] = data


def test_every_column_of_every_table_is_defined():
    outline = Outline(usual())
    assert len(outline.tables) == 3
    for headers, terms in outline.tables:
        assert headers == list(terms)
        assert all(len(meaning) > 15 for meaning in terms.values())
    assert all("scroll" in around for around in outline.boxes)  # a wide table scrolls in its own box
    assert "nats per token" in outline.tables[0][1]["KL(teacher ‖ student)"]
    assert outline.open == []


def test_each_corpus_of_a_mixture_has_rows_and_bars():
    names = ["reviews.jsonl", "org/data:<b>"]
    mixed = []
    for one, known in zip(CONTENDERS, (100.0, 61.5, -8.5), strict=True):
        ends = {"perplexity": [12.25, 34.5], "kl": [0.125, 0.5]}
        found = [TaskResult(0.75, one.held_out, known, ends), TaskResult(0.25, one.held_out, None, ends)]
        mixed.append(replace(one, tasks=dict(zip(names, found, strict=True))))
    outline = Outline(made(contenders=mixed))
    headers, terms = outline.tables[1]  # after the results
    assert headers == list(terms) == ["task", "share", "model", "perplexity", "KL(teacher ‖ student)", "retention"]
    assert "the corpus' training text" in terms["retention"]
    cells = [text for path, text in outline.texts if path[-2:] == ["tr", "td"]]
    assert [cells.count(name) for name in names] == [3, 3]
    assert {"75.0%", "25.0%", "61.5 %", "-8.5 %", "–"} <= set(cells)
    assert outline.tags.count("svg") == 5 + len(PROMPTS) + 2 + 2
    assert len(outline.ids) == len(set(outline.ids))
    assert "Each task" in [text for path, text in outline.texts if path[-1:] == ["h2"]]
    (axes,) = plots.tasks(mixed, "retention").axes
    assert [bar.get_width() for bar in axes.patches] == [61.5, 0.0, -8.5, 0.0]
    assert {"61.5", "-8.5", "–", *names} <= {text.get_text() for text in axes.texts}
    (axes,) = plots.tasks(mixed, "kl").axes
    assert [bar.get_width() for bar in axes.patches] == [one.held_out.kl for one in mixed[1:] for _ in names]


def test_a_column_without_a_meaning_or_a_measure_without_a_column_is_noticed():
    assert list(MEASURES) == list(METRICS)
    for column in MEASURES.values():
        assert column.unit
        assert column.better in ("lower", "higher")
    page = report_page._table(Table([Column("a", "", "")], []))
    ((headers, terms),) = Outline(page).tables
    assert headers == ["a"]
    assert not all(terms.values())


def test_nothing_comes_from_outside_and_no_id_clashes():
    page = usual()
    outline = Outline(page)
    assert not re.search(r"https?:|//|@import|src=|<link|<script|xmlns", page.replace("]//", ""))
    assert len(outline.ids) == len(set(outline.ids)) > 4
    assert set(outline.references) <= set(outline.ids)
    assert outline.tags.count("svg") == 5 + len(PROMPTS) + 2
    assert 'name="viewport"' in page
    assert len(page) < 200_000


def test_text_of_others_is_shown_as_it_is():
    page = usual()
    assert "<script" not in page
    assert "</svg><script" not in page
    assert "1 &lt; 2 &amp; &lt;b&gt;" in page
    assert "A &amp; B &lt;CPU&gt;" in page
    shown = "".join(text for path, text in Outline(page).texts if "figcaption" in path)
    assert PROMPTS[1] in shown


@pytest.mark.parametrize(
    ("line", "kind", "words", "text"),
    [
        (Finding("PASS: it is lower", True), "pass", "✓ PASS", "it is lower"),
        (Finding("FAIL: it is not", False), "fail", "✗ FAIL", "it is not"),
        (Finding("kl 0.5 (< 1.0): good", True), "pass", "✓ MET", "kl 0.5 (&lt; 1.0): good"),
        (Finding("kl 1.5 (< 1.0): train", False), "fail", "✗ MISSED", "kl 1.5 (&lt; 1.0): train"),
        ("training took: long", "note", "NOTE", "training took: long"),
    ],
)
def test_goals_are_marked_in_words_and_colour(line, kind, words, text):
    page = report_page._verdict([line])
    assert f'<li><span class="mark {kind}">{words}</span><span>{text}</span></li>' in page
    assert (f".{kind} {{ color:" in report_page._STYLE) == (kind != "note")


def test_intervals_stand_below_their_values():
    page = usual()
    assert "<small>12.2 to 34.5</small>" in page
    assert "<small>0.125 to 0.500</small>" in page
    table = results(CONTENDERS, ["kl", "out_of_domain_perplexity"])
    assert [cell.small for cell in table.rows[0][2:]] == ["", ""]  # the teacher's divergence from itself; no such text
    assert table.rows[0][3].text == "–"


def test_the_student_is_compared_with_each_other_model():
    rows = [[cell.text for cell in row] for row in comparison(differences(CONTENDERS, 0)).rows]
    assert [row[:2] for row in rows] == [
        [TEACHER, "perplexity"],
        [CE_ONLY, "perplexity"],
        [CE_ONLY, "KL(teacher ‖ student)"],
    ]
    assert [row[4] for row in rows] == ["worse", "undecided", "better"]
    assert rows[2][2] == "−0.275"
    assert rows[0][2].startswith("+")
    assert '<span class="mark pass">✓ better</span>' in usual()
    ends = {"difference": -0.25, "interval": [-0.5, 0.25]}
    (row,) = comparison({CE_ONLY: {"kl": ends}}).rows
    assert [cell.text for cell in row[2:]] == ["−0.250", "−0.500 to +0.250", "undecided"]
    (row,) = comparison({CE_ONLY: {"kl": {"difference": 0.0, "interval": None}}}).rows
    assert [cell.text for cell in row[2:]] == ["0.000", "–", "undecided"]


def test_bars_show_what_any_model_holds_likeliest():
    assert plots.likeliest([TEACHER_ONE], 0) == [3, 4, 5, 6, 7, 8]
    union = plots.likeliest([TEACHER_ONE, STUDENT_ONE], 0)
    assert union == [3, 4, 5, 6, 7, 8, 20, 21, 22]  # by the teacher's probability, then by id
    figure = plots.next_tokens([TEACHER_ONE, STUDENT_ONE], 0, str)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [str(token) for token in union]
    student = STUDENT_ONE.next_tokens[0].softmax(-1)[union].tolist()
    assert [bar.get_width() for bar in figure.axes[0].containers[1]] == pytest.approx(student)
    page = usual()
    assert all(f"␣t{token}<" in page for token in (*union, 25))


def test_curves_are_drawn_of_what_is_logged():
    page = usual()
    assert all(f"{title}</text>" in page for title in ("hard ÷ soft loss", "learning rate", "gradient norm"))
    lines = [{key: value for key, value in line.items() if key != "grad_norm"} for line in fitted().history]
    lines = [line | {"ratio": float("inf")} for line in lines]  # no soft loss, and no clipping
    plain = made({STUDENT: Fitted(lines, 12345, 3, 384, [])}, prompts=[])
    assert "hard ÷ soft loss</text>" not in plain
    assert "gradient norm</text>" not in plain
    assert "learning rate</text>" in plain
    assert len(plots.course({STUDENT: fitted()}, "ratio", "").axes[0].lines[0].get_xdata()) == 3


def test_a_run_is_described_as_far_as_it_is_recorded():
    page = usual()
    for fact in ("A &amp; B &lt;CPU&gt;, cores: 2, threads: 1", "torch 2.13.0", "1,234.5 s", "384", "85"):
        assert fact in page
    assert page.count("4 windows, 40 predicted tokens") == 2
    bare = made({}, found={}, prompts=[])
    assert "<h2>Results" in bare
    assert "<h2>Training" not in bare
    assert "expect next" not in bare


def test_every_section_says_what_to_look_for():
    page = usual()
    heads = re.findall(r'<h2>.*?</h2>(<p class="look">Look .*?</p>)?', page)
    assert len(heads) == 9
    assert all(heads)


def test_two_figures_of_one_kind_share_no_id_and_follow_the_colour_of_the_page():
    def drawn(name):
        figure = Figure()
        figure.subplots().plot([0, 1], [0, 1], "o-")
        return inline_svg(figure, name, 'a "label" <')

    first, second = drawn("one"), drawn("two")
    assert drawn("one") == first
    ids = [set(re.findall(r' id="([^"]*)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert ids[1]
    assert not ids[0] & ids[1]
    assert 'aria-label="a &quot;label&quot; &lt;"' in first
    assert "currentColor" in first
    assert "#000000" not in first
    assert "<style" not in first
    assert not re.search(r"\d\.\d{3}", re.sub(r'style="[^"]*"', "", first))
