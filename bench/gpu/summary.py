"""What a visit found, for a person who reads it: failures first, then bars, times and everything else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.gpu.findings import Finding
from bench.harness.contender import FRESH
from bench.harness.question import Bar
from bench.harness.results import Result, Verdict

__all__ = ["failures", "text"]

_TOLD = 6  # settings of the launch table, operations of a profile


def _of(findings: Sequence[Finding], kind: str) -> list[Finding]:
    return [each for each in findings if each["kind"] == kind]


def failures(findings: Sequence[Finding]) -> list[str]:
    """Everything that makes a visit a failure: checks, processes, contenders of fastkd's own."""
    failed = [
        f"{each['name']} [{each['walk']}]: {each['problem']}" for each in _of(findings, "check") if not each["ok"]
    ]
    failed += [
        f"{each['question']}, {each['case']}: {each['contender']} is wrong or does not run"
        for each in _of(findings, "failed")
        if each["contender"].startswith(FRESH)
    ]
    errors = {(each["step"], each["walk"], each["what"]): each["error"] for each in _of(findings, "error")}
    for each in _of(findings, "ended"):
        if not each["ok"]:
            printed = each["log"].strip().splitlines() or ["it printed nothing"]
            last = errors.get((each["step"], each["walk"], f"step {each['step']}"), printed[-1])
            failed.append(f"step {each['step']} [{each['walk']}, part {each['part']}]: {each['how']}: {last}")
    failed += [
        f"step {each['step']} [{each['walk']}] had no time to begin"
        for each in _of(findings, "left")
        if each["count"] is None
    ]
    if not _of(findings, "first"):
        failed.append("not one loss ran")
    return failed


def text(findings: Sequence[Finding], results: Sequence[Result]) -> str:
    """Markdown."""
    return "\n".join(_lines(findings, results)) + "\n"


def _lines(findings: Sequence[Finding], results: Sequence[Result]) -> Iterator[str]:
    for facts in _of(findings, "facts"):
        yield f"# A visit to {facts['machine'].get('gpu', 'no GPU: a dry run, whose times mean nothing')}\n"
        yield ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
        yield f"\nCommit {facts['commit']}, {facts['date']}Z; ways to walk a row: {', '.join(facts['walks'])}."
    checks = _of(findings, "check")
    failed = failures(findings)
    yield f"\n## Correctness: {sum(each['ok'] for each in checks)} of {len(checks)} checks passed\n"
    yield from (f"- FAILED {line}" for line in failed)
    yield from (f"- not reached: {_left(each)}" for each in _of(findings, "left"))
    verdicts = [verdict for result in results for verdict in result.verdicts() if verdict.met is not None]
    if verdicts:
        yield f"\n## Bars: {sum(bool(verdict.met) for verdict in verdicts)} of {len(verdicts)} met\n"
        yield from (f"- {_verdict(verdict)}" for verdict in verdicts)
    yield from _counters(findings)
    for result in results:
        yield from _table(result)
    yield from _launch_tables(findings)
    for each in _of(findings, "profile"):
        yield f"\n## Operations of {each['what']}: {each['launches']}\n"
        yield from (f"- {count} × {name}: {ms:.3f} ms" for name, count, ms in each["operations"][:_TOLD])
    yield f"\n## Errors: {len(_of(findings, 'error'))}\n"
    yield from (f"- {each['what']}: {each['error']}" for each in _of(findings, "error"))
    yield "\n## Steps\n"
    yield from (
        f"- {each['step']} [{each['walk']}, part {each['part']}]: {each['seconds']:.0f} s"
        for each in _of(findings, "ended")
    )


def _left(each: Finding) -> str:
    count = "" if each["count"] is None else f"{each['count']} from "
    return f"{each['step']} [{each['walk']}]: {count}{each['first']}"


def _verdict(verdict: Verdict) -> str:
    bar, result = verdict.bar, verdict.result
    return f"{'met' if verdict.met else 'NOT MET'}: {result.question}, {result.case}: {_said(bar, verdict.measured)}"


def _said(bar: Bar, measured: float) -> str:
    limits = [f"{sign} {limit:.3g}" for sign, limit in (("≥", bar.at_least), ("≤", bar.at_most)) if limit is not None]
    if bar.other is None:
        ratio = bar.ours
    else:
        ratio = f"{bar.other} ÷ {bar.ours}" if bar.inverse else f"{bar.ours} ÷ {bar.other}"
    return f"{ratio} is {measured:.3g} (bar: {' and '.join(limits)})"


def _counters(findings: Sequence[Finding]) -> Iterator[str]:
    """The bar on traffic, which is of no race."""
    for each in _of(findings, "counters"):
        if each["what"].startswith("forward_kl"):
            yield (
                f"- {'met' if each['bytes_per_logit'] <= each['at_most'] else 'NOT MET'}: {each['what']}: "
                f"{each['bytes_per_logit']:.2f} bytes per logit from and to DRAM (bar: ≤ {each['at_most']})"
            )
        yield f"- counters of {each['what']}: {each['values']}"


def _table(result: Result) -> Iterator[str]:
    yield f"\n## {result.question}, {result.case}\n"
    yield f"| | {result.unit} | ÷ {result.ours} | error |\n|---|---|---|---|"
    ours = result.values[result.ours]
    for name, value in result.values.items():
        error = f"{result.errors[name]:.0e}" if name in result.errors else ""
        ratio = f"{value / ours:.3g}" if ours else ""
        yield f"| {name} | {value:.4g} | {ratio} | {error} |"


def _launch_tables(findings: Sequence[Finding]) -> Iterator[str]:
    for each in _of(findings, "table"):
        yield f"\n## Launch table, {each['case']}\n"
        if each["as_is"]:
            yield f"- as it is: {each['as_is'] * 1e3:.3f} ms, {each['least_bytes'] / each['as_is'] / 1e9:.0f} GB/s"
        for setting, seconds in each["tried"][:_TOLD]:
            gain = f", {each['as_is'] / seconds:.2f} times as fast as it is" if each["as_is"] else ""
            yield f"- {setting}: {seconds * 1e3:.3f} ms{gain}"
