"""The benchmark's own arithmetic: what it says of the numbers it has. (The numbers are nobody's to test.)"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastkd
from bench import bench_cache_contents, bench_demo, bench_host, bench_logits, gate
from bench.harness import check, machine, race, store
from bench.harness.check import HARD, SOFT
from bench.harness.contender import Contender
from bench.harness.machine import ALLOCATORS
from bench.harness.question import Case, faster, selected, within
from bench.harness.results import Result, results_of
from bench.questions import QUESTIONS
from bench.report import compared, files, page, readme
from bench.rivals import peers, recipes
from bench.rivals.hidden import Hidden, hidden_loss, projection_contender
from fastkd import at_once, losses
from fastkd.divergences import TABLE, resolve
from tools import host_time

_ROOT = Path(__file__).parent.parent
_README = (_ROOT / "README.md").read_text()


def result(allocator: str = "default", question: str = "logits", **values: float) -> Result:
    bars = (faster("fastkd", "eager", 12), within("fastkd", "add", 2.0))
    return Result(question, "2x3", allocator, "ms", 72, bars, values, {}, {})


def test_the_readme_is_what_the_stored_results_say() -> None:
    shown = readme.shown(_README)
    assert shown
    for folder in shown:
        assert readme.block(_ROOT / folder) in _README


@pytest.mark.parametrize("folder", files.machines(), ids=lambda folder: folder.name)
def test_a_report_is_what_the_stored_results_say(folder: Path) -> None:
    assert page.text(store.load(folder)) == (folder / "report.md").read_text()


def test_the_readme_has_every_headline() -> None:
    """A case that was renamed would be left out without a word."""
    (folder,) = readme.shown(_README)
    assert len(compared.summary(store.load(_ROOT / folder))) == len(compared.HEADLINES)


def test_the_smaller_of_two_allocators_ratios_is_quoted() -> None:
    group = [result(fastkd=1.0, eager=20.0, add=1.0), result("huge_pages", fastkd=2.0, eager=30.0, add=1.0)]
    assert compared.smaller_ratios(group) == {"eager": 15.0}


def test_whatever_beats_fastkd_is_named() -> None:
    """In the report under either allocator; in the README on this machine and on others."""
    beaten = [result(fastkd=1.0, eager=20.0, add=1.0), result("huge_pages", fastkd=2.0, eager=1.0, add=1.0)]
    said = "\n".join(compared.faster(beaten))
    assert "- eager: 2.00 times as fast as fastkd on logits, 2x3 (huge_pages)" in said
    assert "- In memory, nothing." in said
    text = page.text(stored(*beaten))
    assert said in text
    assert "3 of the 4 limits" in text
    other = stored(result(fastkd=4.0, eager=1.0, add=1.0), cpu="b")
    here, there = "\n".join(readme.lines(Path("here"), stored(*beaten), {Path("there"): other})).split("on b, 2 cores")
    assert "logits in fp32 (eager: up to 2.00 times as fast)" in here
    assert "logits in fp32 (eager: up to 4.00 times as fast)" in there


def stored(*results: Result, cpu: str = "a") -> store.Stored:
    facts = {"cpu": cpu, "cores": 2, "threads": 2, "torch": "3", "torch_capability": "b", "fastkd": "0", "backend": "c"}
    facts |= {"transparent_huge_pages": "madvise"}
    return store.Stored((store.Pass("default", "2030-01-01T00:00", "0", facts, ("logits",)),), results)


def test_a_missed_bar_is_called_missed() -> None:
    verdicts = list(result(fastkd=1.0, eager=11.0, add=0.6).verdicts())
    assert [verdict.met for verdict in verdicts] == [False, True]


# --- storing ----------------------------------------------------------------------------------------------------


def test_a_pass_replaces_the_questions_it_asked_and_no_others(tmp_path: Path) -> None:
    def document(*questions: str, at: str) -> dict[str, Any]:
        extra = {"case": "2x3", "unit": "ms", "work": 72, "bars": [], "times": {"fastkd": [1.0]}}
        entries = [{"extra_info": {"question": name, **extra}} for name in questions]
        return {"datetime": at, "machine_info": {"bench": {}}, "benchmarks": entries}

    def kept() -> dict[tuple[str, str], str]:
        found = store.load(tmp_path)
        dates = {(name, each.allocator): each.date for each in found.passes for name in each.questions}
        assert {(one.question, one.allocator) for one in found.results} == dates.keys()
        return dates

    for allocator in ALLOCATORS:
        store.replace_asked(document("logits", "sparse", at="then"), {}, tmp_path, allocator, [allocator])
    store.replace_asked(document("logits", at="now"), {}, tmp_path, ALLOCATORS[0], ALLOCATORS)
    assert kept() == {("logits", ALLOCATORS[0]): "now"} | {("sparse", name): "then" for name in ALLOCATORS}
    store.replace_asked(None, {"sparse": ["bench_sparse"]}, tmp_path, ALLOCATORS[0], ALLOCATORS)
    assert list(kept()) == [("logits", ALLOCATORS[0])]


def test_what_is_stored_is_read_again(tmp_path: Path) -> None:
    """Medians in ms, spreads of what ran more than once, errors of what was verified, bars as they were set."""
    bars = result().bars
    times = {"fastkd": [0.001, 0.002, 0.004], "eager": [0.5]}
    extra = {"question": "logits", "case": "2x3", "unit": "ms", "work": 72, "bars": [vars(bar) for bar in bars]}
    extra |= {"times": times, "errors": {"fastkd": 1e-7, "eager": None}}
    run = {"datetime": "now", "machine_info": {"bench": {}}, "benchmarks": [{"extra_info": extra}]}
    store.replace_asked(run, {"logits": ["a test"]}, tmp_path, "default", ["default"])
    (found,), (of,) = store.load(tmp_path).results, store.load(tmp_path).passes
    assert [found] == results_of(run, "default")
    assert found.values == {"fastkd": 2.0, "eager": 500.0}
    assert (found.bars, found.spreads, found.errors, found.noise) == (bars, {"fastkd": 0.75}, {"fastkd": 1e-7}, None)
    assert of.failed == {"logits": ["a test"]}


@pytest.mark.parametrize(
    ("cpu", "vectors", "name"),
    [
        ("AMD EPYC", "AVX2", "amd-epyc-2-cores-avx2"),
        ("Intel(R) Xeon(R) @ 2.0GHz", "AVX512", "intel-r-xeon-r-2-0ghz-2-cores-avx512"),
    ],
)
def test_machines_that_differ_have_folders_of_their_own(
    monkeypatch: pytest.MonkeyPatch, cpu: str, vectors: str, name: str
) -> None:
    monkeypatch.setattr(machine, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(machine, "processor", lambda: cpu)
    monkeypatch.setattr(machine, "_cores", lambda: 2)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    assert machine.results() == _ROOT / "bench" / "results" / name


def test_a_demo_of_another_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = tmp_path / "metrics.json"
    metrics.write_text(json.dumps({"models": {}, "training": {"student": {"tokens": 128}}}))
    monkeypatch.setattr(bench_demo, "_METRICS", metrics)
    with pytest.raises(AssertionError, match="trained on 128 tokens, not on the demo's 114,688: run make demo"):
        bench_demo.bench_demo(None, bench_demo.CASES[0])  # type: ignore[arg-type]


def test_the_demo_that_is_asked_about_is_the_one_that_is_run() -> None:
    """An evaluation after each epoch, of so many steps."""
    settings = dict(re.findall(r"^(\w+): (\d+)", (_ROOT / "examples" / "demo.yaml").read_text(), re.M))
    epochs, batch, steps = (int(settings[name]) for name in ("epochs", "batch_size", "eval_steps"))
    assert epochs * batch * steps * 128 == bench_demo.TOKENS


# --- questions and rivals ---------------------------------------------------------------------------------------


def test_every_question_is_found_in_the_file_that_asks_it() -> None:
    named = {path.stem for path in (_ROOT / "bench").glob("bench_*.py")}
    assert {"logits", "divergences", "accuracy", "projections_soft", "demo_kl"} <= QUESTIONS.keys()
    assert len(QUESTIONS) >= len(named)


_LAYERS = ("harness", "rivals", "bench_", "questions", "report")  # each imports none that stands after it


@pytest.mark.parametrize("path", sorted((_ROOT / "bench").rglob("*.py")), ids=lambda path: path.stem)
def test_no_import_climbs(path: Path) -> None:
    inside = str(path.relative_to(_ROOT / "bench"))
    own = next((number for number, layer in enumerate(_LAYERS) if inside.startswith(layer)), len(_LAYERS))
    for layer in re.findall(r"^\s*(?:from|import) bench(?:\.| import )(\w+)", path.read_text(), re.MULTILINE):
        assert any(layer.startswith(name) for name in _LAYERS[: own + 1]) or own == len(_LAYERS), layer


@pytest.mark.parametrize("name", [*TABLE, *bench_logits.MIXES])
def test_every_divergence_is_raced_against_a_recipe_that_is_right(name: str) -> None:
    recipes.recipe_is_right(resolve(name), 2.0)
    raced = {case.divergence for case in bench_logits.CASES}
    assert name in raced


class _Torch:
    """torch's `linear_cross_entropy`, whose chunks take probabilities or, as in 2.13, do not."""

    def __init__(self, takes_probabilities: bool) -> None:
        self.takes_probabilities = takes_probabilities
        self.in_chunks = 0

    def linear_cross_entropy(
        self, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, *, options: object = None
    ) -> torch.Tensor:
        known = target.dtype == torch.int64 or (self.takes_probabilities and target.dtype == hidden.dtype)
        if options is not None and not known:
            warnings.warn("linear_cross_entropy: ``options`` ignored", stacklevel=2)
        self.in_chunks += options is not None
        return torch.nn.functional.cross_entropy(hidden.float() @ weight.float().T, target)

    def exported(self, module: str, name: str) -> object:
        return self.linear_cross_entropy if name == "linear_cross_entropy" else lambda **options: options


@pytest.mark.parametrize("takes_probabilities", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchs_chunks_are_raced_with_probabilities_where_they_take_them(
    monkeypatch: pytest.MonkeyPatch, takes_probabilities: bool, dtype: torch.dtype
) -> None:
    name, stand_in = "linear_cross_entropy chunked", _Torch(takes_probabilities)
    monkeypatch.setattr(peers, "_exported", stand_in.exported)
    for objective, sizes in ((SOFT, (8, 12)), (HARD, (8,))):
        offered = takes_probabilities or objective == HARD
        assert name in peers.raced(objective)
        assert (hidden_loss(name, objective) is not None) == offered
        if offered:
            batch = Hidden.random(20, 33, sizes, dtype)
            contender = projection_contender(name, batch, batch.truth(objective), objective)
            before = stand_in.in_chunks
            contender.verify(contender.run())
            assert stand_in.in_chunks == before + 1


@pytest.mark.skipif(not fastkd.backends()["cpu"].available, reason="the native library is not there")
@pytest.mark.parametrize("case", [case for case in bench_host.CASES if case.question == bench_host.SMALL], ids=str)
def test_a_small_loss_is_one_native_call(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """Each contender of fastkd's, as it is timed, goes the way that is asked about, and is named in the bars."""
    monkeypatch.setattr(machine, "DEVICE", torch.device("cpu"))
    general: list[str] = []
    computed = at_once.loss

    def watched(*arguments: Any) -> Any:
        found = computed(*arguments)
        if found is None:
            general.append("the general way")
        return found

    monkeypatch.setattr(losses.at_once, "loss", watched)
    monkeypatch.setattr(
        host_time, "microseconds", lambda contenders: {name: run() for name, (_, run) in contenders.items()}
    )
    names = bench_host.in_main_memory(case).keys()
    assert not general
    assert {bar.ours for bar in case.bars} == {name for name in names if name.startswith("fastkd")}


def test_what_is_asked_of_cpus_is_not_asked_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "DEVICE", torch.device("cuda"))
    assert selected(bench_host.CASES, quick=False) == [bench_host.FOR_GPUS]
    monkeypatch.setattr(machine, "DEVICE", torch.device("cpu"))
    assert selected(bench_host.CASES, quick=False) == list(bench_host.CASES)


# --- judging ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 2**18 - 1), (7, 2**18), (7, 2**19), (1000, 1000)])
def test_slabs_hold_every_row_once_and_little_at_a_time(rows: int, columns: int) -> None:
    slabs = [range(rows)[slab] for slab in check.slabs(rows, columns)]
    assert [row for slab in slabs for row in slab] == list(range(rows))
    assert max(map(len, slabs)) * columns <= max(columns, 2**18)


# --- taking turns ---------------------------------------------------------------------------------------------


class _Pedantic:
    """pytest-benchmark's fixture, without its own timing."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, run: Callable[[], None], setup: Callable[[], None], rounds: int) -> None:
        for _ in range(rounds):
            setup()
            run()


def test_who_counts_from_its_first_run_and_who_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a slow race the quick settle before each round, the slow count the checked run, the slowest has no other."""
    now, runs, benchmark = [0.0], dict.fromkeys(("fastkd", "eager", "compile", "add"), 0), _Pedantic()

    def contender(name: str, seconds: float) -> Contender:
        def run() -> None:
            runs[name] += 1
            now[0] += seconds if runs[name] > 1 else 2 * seconds  # cold

        return Contender(name, run, compiles=name == "compile")

    def clock() -> Callable[[], float]:
        start = now[0]
        return lambda: now[0] - start

    monkeypatch.setattr(race, "_clock", clock)
    contenders = [contender(*pair) for pair in (("fastkd", 0.1), ("eager", 8.0), ("compile", 3.0), ("add", 0.05))]
    race.race(benchmark, contenders, bench_logits.CASES[0], quick=False)  # type: ignore[arg-type]
    times = {name: [round(value, 6) for value in some] for name, some in benchmark.extra_info["times"].items()}
    assert times == {"fastkd": [0.1] * 3, "eager": [16.0], "compile": [3.0] * 3, "add": [0.05] * 3}


# --- the gate ---------------------------------------------------------------------------------------------------


def ratios(fastkd: float, eager: float, add: float) -> gate.Ratios:
    return gate.ratios_of([result(fastkd=fastkd, eager=eager, add=add)])


def test_the_gate_sees_what_slowed_fastkd_down() -> None:
    assert gate.lost(ratios(1, 20, 1), ratios(1.5, 20, 1)) == {("logits, 2x3", "fastkd"): pytest.approx(1.5)}


@pytest.mark.parametrize(
    "now",
    [
        pytest.param((3, 60, 3), id="a machine three times slower"),
        pytest.param((1, 10, 1), id="a rival twice as fast"),
        pytest.param((1.2, 20, 1), id="noise"),
        pytest.param((0.5, 20, 1), id="progress"),
    ],
)
def test_the_gate_lets_pass(now: tuple[float, float, float]) -> None:
    assert not gate.lost(ratios(1, 20, 1), ratios(*now))


# --- timing on a GPU that is not there --------------------------------------------------------------------------


class _Stream:
    """A clock that moves by what is queued; events note where it is when the queue gets to them."""

    now = 0.0

    def event(self, *, enable_timing: bool) -> _Event:
        assert enable_timing
        return _Event(self)


class _Event:
    def __init__(self, stream: _Stream) -> None:
        self.stream = stream

    def record(self) -> None:
        self.at = self.stream.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.at - self.at)


def test_on_a_gpu_events_are_read_and_not_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = _Stream()
    monkeypatch.setattr(machine, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    stream.now = 5.0
    assert race.timed(Contender("launch", queued(stream, 0.25))) == pytest.approx(0.25)


def queued(stream: _Stream, seconds: float) -> Callable[[], object]:
    def launch() -> None:
        stream.now += seconds

    return launch


def test_gradients_from_caches_turn_less_the_more_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(*shape, generator=generator) for shape in ((16, 8, 12), (300, 12)))
    rows, ids = fastkd.Projection(hidden, head), torch.randint(300, (16, 8), generator=generator)
    monkeypatch.setattr(bench_cache_contents.teachers, "rows_of", lambda tokens: rows)
    monkeypatch.setattr(bench_cache_contents.teachers, "windows", lambda tokens: ids)
    case = Case(bench_cache_contents.GRADIENT, 128, 300, torch.float32, (), hidden=(4, 12))
    found = bench_cache_contents._angles(case, tmp_path)
    assert 0 < found["ghost 64"] < found["ghost 12"] < 90
    assert 0 < found["sampled 64"] < found["sampled 12"] < 90
