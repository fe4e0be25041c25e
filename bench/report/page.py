"""`report.md` of one machine: summary, what is faster than fastkd, every table, and how to read them.

Every number is a median over rounds, every ratio a ratio of medians; the noise column says how far to trust them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tabulate import tabulate

from bench.harness import machine
from bench.harness.question import Bar, Question, Section
from bench.harness.results import Result, Verdict, in_order
from bench.harness.store import Pass, Stored
from bench.questions import QUESTIONS
from bench.report import compared, rates
from bench.rivals.peers import RIVALS

__all__ = ["text"]

_SUMMARY = """\
The first column is the time of fastkd's forward and backward pass with torch's default allocator. A ratio such as 23×
is how many times as long as fastkd the other takes. Where there are two ratios, one with either allocator, it is the
smaller one. The best other is the fastest of chunked autograd, other libraries' losses and torch's own fused ones;
– means that none was measured."""
_READING = """\
**Method.** All contenders of a case compute the same objective on the same inputs. Each is checked against float64
before it is timed, and they take turns, so that a slow spell of the machine hits all of them.

**Allocators.** The first touch of fresh memory dominates eager PyTorch on CPUs. So the main cases run twice: with
torch's default allocator (`default`) and with huge pages for torch's tensors (`huge_pages`, which is
`THP_MEM_ALLOC_ENABLE=1`). fastkd asks for huge pages for its own gradients of logits under either.

**Cases.** `1024x50257 float32` is 1024 tokens × a vocabulary of 50257; N is the first number, V the second, b the bytes
of an element. `hidden 256/768` are the hidden sizes H of student and teacher, `K = 64` the tokens of a row that are
known of the teacher.

**Contenders.** A column with a contender's name is its median over rounds, in the unit of the table.

- `fastkd` writes a new gradient; `fastkd in place` overwrites the logits with it; `fastkd fp32` is given bf16 inputs
  that were widened to fp32 before.
- `eager` is the textbook recipe in PyTorch, `eager fp32` the same with bf16 logits widened first, `compile` is
  `torch.compile` of it, `chunked` a loop over 128 tokens at a time under autograd. The others are other libraries'
  losses, and torch's own `linear_cross_entropy`.
- A *floor* does the least work of the case and nothing else: `add` is torch.add of student and teacher into fresh
  memory, `add out=` into memory touched before, `products` the matrix products alone, `sum` one read of the logits,
  `autograd alone` a function that computes nothing and returns a gradient that is there.

**Other columns.**

- *floor ÷ fastkd*: how much of fastkd's time the floor takes. 100 % is as fast as the floor.
- *least MB*, *least GFLOP*: the least work, by the formula above the table. *GB/s*, *GFLOP/s*: the least work ÷ the
  time of fastkd.
- *noise*: the widest interquartile range of a contender ÷ its median. *once*: a rival took more than ten seconds and
  ran once.
- *error*: relative L2 error of the gradient against float64 (row functions: the largest relative error), of fastkd and
  of its rivals.

**Ratios.** `A ÷ B` is the median of A divided by that of B. `eager ÷ fastkd` above 1 means that fastkd is faster (or
smaller, or more exact); `fastkd ÷ add` is fastkd's distance from the floor. Limits that fastkd sets itself are in
parentheses, with *met* or *MISSED*."""
_RATES_PLOT = """\
![The rate of every loss from hidden states, beside that of the machine's matrix products](rates.png)

A bar is the FLOPs of a loss's matrix products ÷ fastkd's time, forward and backward, with torch's default allocator.
The tick is the rate of the products alone in the same race. A dashed line is the best rate of products that was
measured here, in fp32 and, where there are units for it, in bf16: what a loss would reach if it did nothing else. Where
bf16 is multiplied on a CPU it cannot: the gradient of logits enters its products in two pieces, counted as one."""
_SIZES = {"bytes": ("MB", 1e6), "flops": ("GFLOP", 1e9)}
_RATES = {"bytes": "GB/s", "flops": "GFLOP/s"}


def text(stored: Stored) -> str:
    return "\n".join(_lines(stored)) + "\n"


def _lines(stored: Stored) -> Iterator[str]:
    place = list(QUESTIONS).index
    results = sorted(stored.results, key=lambda result: place(result.question))  # allocators stay in turn
    judged = [verdict for result in results for verdict in result.verdicts() if verdict.met is not None]
    missed = [verdict for verdict in judged if not verdict.met]
    yield f"# Benchmarks on {compared.machine_of(stored)}\n"
    yield "Written by `python -m bench.report`.\n\n## Summary\n"
    if compared.summary(stored):
        yield f"{_SUMMARY}\n"
        yield from compared.table(stored)
        yield "\n![How many times as long as fastkd each takes](speedups.png)\n"
    yield f"{len(judged) - len(missed)} of the {len(judged)} limits that fastkd sets itself are met."
    yield from _failures(stored)
    yield "\n## Where something else is faster\n"
    yield from compared.faster(results)
    if missed:
        yield "\n## Limits that are missed\n"
        yield from (f"- {_title(verdict.result)}: {_head(verdict.bar)}: {_verdict(verdict)}" for verdict in missed)
    yield f"\n## How to read the tables\n\n{_READING}"
    for section in Section:
        asked = [question for question in QUESTIONS.values() if question.section == section]
        mine = {each.name: [result for result in results if result.question == each.name] for each in asked}
        if any(mine.values()):
            yield f"\n## {section.value}"
            if section == Section.HIDDEN and rates.rates(stored):
                yield f"\n{_RATES_PLOT}"
            for question in asked:
                if mine[question.name]:
                    yield from _tables(mine[question.name], question)
    yield "\n## Machine and versions\n"
    yield from (f"- {', '.join(each.questions)}: {_machine_line(each)}" for each in stored.passes)


def _failures(stored: Stored) -> Iterator[str]:
    failed = [
        f"{test} ({each.allocator})" for each in stored.passes for tests in each.failed.values() for test in tests
    ]
    if failed:
        yield f"\n{len(failed)} FAILED, a contender being wrong or not running; they are in no table:\n"
        yield from (f"- {line}" for line in failed)


def _machine_line(each: Pass) -> str:
    facts = each.machine
    device = f"{facts['gpu']} (CUDA {facts['cuda']}), " if "gpu" in facts else ""
    peers = "".join(f", {peer} {facts[peer]}" for peer in machine.PEERS if peer in facts)
    return (
        f"allocator {each.allocator}: {device}{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, "
        f"torch {facts['torch']} ({facts['torch_capability']}), fastkd {facts['fastkd']} "
        f"({facts['backend']}){peers}, transparent huge pages {facts['transparent_huge_pages']}, "
        f"{each.date}Z, commit {each.commit}"
    )


def _title(result: Result) -> str:
    return f"{result.question}, {result.case}, {result.allocator}"


def _tables(results: list[Result], question: Question) -> Iterator[str]:
    """What was measured, then the ratios of it."""
    order = in_order(result.case for result in results)
    results = sorted(results, key=lambda result: order.index(result.case))
    yield f"\n### {question.title}\n\n`{question.name}`. {question.about} Unit: {question.unit}.\n"
    yield _values(results, question)
    heads = in_order(_head(bar) for result in results for bar in result.bars)
    if heads:
        yield ""
        yield _ratios(results, heads)


def _values(results: list[Result], question: Question) -> str:
    contenders = in_order(name for result in results for name in result.values)
    timed, floor = question.unit == "ms", question.floor
    size, scale = _SIZES[question.measure]
    rows = []
    for result in results:
        row = [result.case, result.allocator, *(_number(result.values.get(name)) for name in contenders)]
        if floor is not None:
            row += [f"{result.values[floor] / result.values[result.ours]:.0%}" if floor in result.values else "–"]
        if timed:
            row += [
                f"{result.work / scale:.0f}",
                f"{result.work / result.values[result.ours] / 1e6:.1f}",
                "once" if result.noise is None else f"{result.noise:.0%}",
                ", ".join(_errors(result)),
            ]
        rows.append(row)
    columns = ["case", "allocator", *contenders]
    columns += [f"{floor} ÷ fastkd"] if floor is not None else []
    columns += [f"least {size}", _RATES[question.measure], "noise", "error"] if timed else []
    return _github(rows, columns)


def _ratios(results: list[Result], heads: list[str]) -> str:
    rows = []
    for result in results:
        verdicts = {_head(verdict.bar): _verdict(verdict) for verdict in result.verdicts()}
        rows.append([result.case, result.allocator, *(verdicts.get(head, "–") for head in heads)])
    return _github(rows, ["case", "allocator", *heads])


def _errors(result: Result) -> Iterator[str]:
    """Of fastkd, and of the rivals by name."""
    for name, error in result.errors.items():
        if name == result.ours:
            yield f"{error:.0e}"
        elif name in RIVALS:
            yield f"{name} {error:.0e}"


def _github(rows: Iterable[Iterable[str]], columns: list[str]) -> str:
    return str(tabulate(rows, columns, tablefmt="github", disable_numparse=True))


def _head(bar: Bar) -> str:
    if bar.other is None:
        return f"{bar.ours}, limit"
    return f"{bar.other} ÷ {bar.ours}" if bar.inverse else f"{bar.ours} ÷ {bar.other}"


def _verdict(verdict: Verdict) -> str:
    measured = _number(verdict.measured)
    if verdict.met is None:
        return measured
    return f"{measured} ({_limit(verdict.bar)}) {'met' if verdict.met else 'MISSED'}"


def _limit(bar: Bar) -> str:
    if bar.at_least is None:
        return f"≤ {bar.at_most:g}"
    return f"≥ {bar.at_least:g}" if bar.at_most is None else f"{bar.at_least:g} … {bar.at_most:g}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"
