"""Rates of products and of losses: what `bench_products` measures, and what the report draws of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import bench_products
from bench.harness import check, machine, store
from bench.harness.results import Result
from bench.report import files, page, rates

_CASE = replace(bench_products.CASES[0], rows=3, vocab=37, hidden=(5,))


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(machine, "DEVICE", torch.device("cpu"))
    return monkeypatch


@pytest.mark.parametrize("dtype", bench_products.PEAKS, ids=str)
def test_the_products_are_those_of_a_loss(dtype: torch.dtype) -> None:
    """Logits, d hidden and d weight, of the same numbers in fp32."""
    if dtype == torch.bfloat16 and bench_products.cpu._gemm() is None:
        pytest.skip("this PyTorch exports no product that keeps fp32")
    contenders = list(bench_products._contenders(_CASE, dtype))
    logits, d_hidden, d_weight = (contender.run() for contender in contenders)
    generator = machine.generator()
    states, weight, gradient = (
        torch.randn(shape, generator=generator).to(dtype).double() for shape in ((3, 5), (37, 5), (3, 48))
    )
    gradient = gradient[:, :37]
    for found, truth in (
        (logits, states @ weight.T),
        (d_hidden, gradient @ weight),
        (d_weight, gradient.T @ states),
    ):
        assert isinstance(found, torch.Tensor)
        assert found.dtype == torch.float32
        assert check.error(found, truth) < 1e-6


def test_rates_are_flops_by_time(on_a_cpu: pytest.MonkeyPatch) -> None:
    on_a_cpu.setattr(bench_products, "timed", lambda contender: 2.0 if contender.name == "fp32 logits" else 1.0)
    found = bench_products.rates(_CASE)
    assert found["fp32 logits"] == pytest.approx(2 * 3 * 5 * 37 / 2.0 / 1e9)
    assert found["fp32 d weight"] == pytest.approx(2 * found["fp32 logits"])


@pytest.mark.parametrize(("missing", "measured"), [("no bf16 units", ["fp32"]), (None, ["fp32", "bf16"])])
def test_bf16_is_measured_where_there_are_units(
    on_a_cpu: pytest.MonkeyPatch, missing: str | None, measured: list[str]
) -> None:
    on_a_cpu.setattr(bench_products.cpu, "missing", lambda: missing)
    on_a_cpu.setattr(bench_products, "timed", lambda contender: 1.0)
    names = bench_products.rates(_CASE)
    assert list(dict.fromkeys(name.split()[0] for name in names)) == measured
    assert len(names) == 3 * len(measured)


# --- the plot ---------------------------------------------------------------------------------------------------

_FP32, _BF16 = "8x9 float32 hidden 4", "8x9 bfloat16 hidden 4"


def raced(case: str, allocator: str = "default", question: str = "projections", **ms: float) -> Result:
    return Result(question, case, allocator, "ms", 6_000_000, (), ms, {}, {})


def alone(**rates: float) -> Result:
    named = {name.replace("_", " "): rate for name, rate in rates.items()}
    return Result("products", _FP32, "default", "GFLOP/s", 1, (), named, {}, {})


def stored(*results: Result) -> store.Stored:
    facts = {"cpu": "a", "cores": 2, "threads": 2, "torch": "3", "torch_capability": "b", "fastkd": "0"}
    facts |= {"transparent_huge_pages": "madvise", "backend": "native; bf16 products: mkl (mkl is 2.00 times as fast)"}
    return store.Stored((store.Pass("default", "2030-01-01T00:00", "0", facts, ("projections",)),), results)


def test_a_bar_is_the_rate_of_a_case_under_the_default_allocator() -> None:
    found = rates.rates(
        stored(
            raced(_FP32, fastkd=3.0, products=2.0),
            raced(_FP32, "huge_pages", fastkd=1.0, products=1.0),
            raced(_BF16, fastkd=6.0),
            raced(_FP32, question="projections_hard", fastkd=4.0),
            raced(_FP32, question="logits", fastkd=5.0),
        )
    )
    assert [(row.dtype, row.ours, row.products) for row in found] == [
        ("fp32", 2.0, 3.0),
        ("bf16", 1.0, None),
        ("fp32", 1.5, None),
    ]
    assert found[0].label == "forward KL + cross-entropy\n8 × 9 float32 hidden 4"


def test_a_line_is_the_best_rate_of_any_bare_product() -> None:
    floors = raced(_FP32, fastkd=3.0, products=2.0), raced(_FP32, "huge_pages", fastkd=1.0, products=1.5)
    assert rates.peaks(stored(*floors)) == {"fp32": 4.0}
    measured = alone(fp32_logits=3.5, fp32_d_hidden=5.0, bf16_logits=9.0)
    assert rates.peaks(stored(*floors, measured)) == {"fp32": 5.0, "bf16": 9.0}
    assert rates.peaks(stored(raced(_BF16, fastkd=1.0))) == {}


def test_the_plot_is_drawn_from_whatever_is_there(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    one = raced(_BF16, fastkd=1.0)
    for number, results in enumerate([[one], [one, alone(fp32_logits=2.0)], [raced(_FP32, fastkd=1e-4), one]]):
        rates.draw(stored(*results), tmp_path / f"{number}.png")
    rates.draw(stored(raced(_FP32, question="logits", fastkd=1.0)), tmp_path / "none.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", "2.png"]


def test_the_page_shows_the_plot_and_who_multiplies() -> None:
    text = page.text(stored(raced(_BF16, fastkd=1.0)))
    assert "](rates.png)\n" in text
    assert "bf16 products: mkl (mkl is 2.00 times as fast)" in text
    assert "rates.png" not in page.text(stored(raced(_FP32, question="logits", fastkd=1.0)))


@pytest.mark.parametrize("folder", files.machines(), ids=lambda folder: folder.name)
def test_what_a_report_shows_is_there(folder: Path) -> None:
    shown = [name for name in ("speedups.png", "rates.png") if f"]({name})" in (folder / "report.md").read_text()]
    assert shown
    assert all((folder / name).exists() for name in shown)
