"""What there is to do at a GPU, in its order, and how long it may take."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FACTS", "SECONDS", "STAGES", "Step", "selected"]

SECONDS = 345  # of a whole visit


@dataclass(frozen=True)
class Step:
    name: str
    module: str  # its function run(visit) is the step
    seconds: float  # at most
    processes: int = 1  # that share the work, where there are as many cores
    walks: float | None = None  # seconds at most with each walk but the default one; None: they make no difference
    alone: bool = False  # whether it has the device to itself


FACTS = Step("facts", "bench.gpu.facts", 40)
#: Steps of a stage run side by side, but for those that time. With three walks the limits add up to `SECONDS`.
STAGES: tuple[tuple[Step, ...], ...] = (
    (
        Step("calls", "bench.gpu.check_calls", 90, 2, walks=90),
        Step("logits", "bench.gpu.check_logits", 90, 6, walks=90),
        Step("hidden", "bench.gpu.check_hidden", 90, 4, walks=90),
        Step("repeats", "bench.gpu.check_repeats", 90, 2, walks=90),
        Step("sparse", "bench.gpu.check_sparse", 90, 2),
        Step("sanitize", "bench.gpu.sanitize", 90, walks=90),
        Step("compile_table", "bench.gpu.compile_table", 90, 2),
    ),
    (Step("time_logits", "bench.gpu.time_logits", 55, walks=20, alone=True),),
    (Step("time_hidden", "bench.gpu.time_hidden", 55, alone=True),),
    (Step("time_host", "bench.gpu.time_host", 15, alone=True),),
    (Step("table", "bench.gpu.launch_table", 25, alone=True),),
    (Step("profile", "bench.gpu.profiles", 25, alone=True),),
)


def selected(names: list[str]) -> list[tuple[Step, ...]]:
    """The stages with only these steps in them. Raises ValueError for a name that is no step."""
    known = [step.name for stage in STAGES for step in stage]
    for name in names:
        if name not in (FACTS.name, *known):
            raise ValueError(f"{name!r} is no step; steps are {', '.join((FACTS.name, *known))}")
    chosen = (tuple(step for step in stage if step.name in names) for stage in STAGES)
    return [stage for stage in chosen if stage]
