"""`python -m bench.scale`: see the package."""

from __future__ import annotations

import argparse
import json
import pathlib

import bench.scale
from bench.scale.formulas import FP32, MIXED, Model
from bench.scale.tables import MODELS, Setting, data, text


def main() -> None:
    default = Setting()
    parser = argparse.ArgumentParser(
        prog="python -m bench.scale",
        description=bench.scale.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pairs = ",".join(":".join(pair) for pair in default.pairs)
    parser.add_argument("--pairs", type=_pairs, default=pairs, help="STUDENT:TEACHER,… (default: %(default)s)")
    parser.add_argument(
        "--model",
        type=_model,
        action="append",
        default=[],
        metavar="NAME=LAYERS:HIDDEN[:tied]",
        help=f"one more than {', '.join(MODELS)}; LAYERS are parameters beside embedding and head",
    )
    parser.add_argument("--ranks", type=_counts, default=default.ranks, help="of all (default: 1,8,64,512,4096)")
    parser.add_argument("--vocab", type=_count, default=default.vocabulary, help="default: %(default)s")
    parser.add_argument("--tokens", type=_count, default=default.tokens, help="of a rank (default: %(default)s)")
    parser.add_argument("--group", type=_count, default=default.group, help="that a vocabulary is spread over")
    parser.add_argument("--fp32", action="store_true", help="parameters are gathered in fp32, not in bf16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default.device, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="bytes, a row of a table each")
    parser.add_argument(
        "--plot", type=pathlib.Path, metavar="FILE", help="draw head and loss over ranks, and no tables"
    )
    options = parser.parse_args()
    setting = Setting(
        pairs=options.pairs,
        ranks=options.ranks,
        vocabulary=options.vocab,
        tokens=options.tokens,
        group=options.group,
        size=FP32 if options.fp32 else MIXED,
        device=options.device,
        models=MODELS | dict(options.model),
    )
    unknown = sorted({name for pair in setting.pairs for name in pair} - setting.models.keys())
    if unknown:
        parser.error(
            f"--pairs names {', '.join(unknown)}: models are {', '.join(setting.models)}, and those of --model"
        )
    uneven = [n for n in setting.ranks if n % min(n, setting.group)]
    if uneven:
        parser.error(f"--ranks {uneven[0]} is no multiple of --group {setting.group}")
    if options.plot:
        from bench.scale.plot import draw  # needs matplotlib

        draw(setting, options.plot)
    else:
        print(json.dumps(data(setting), indent=1) if options.json else text(setting), end="\n" * options.json)


def _count(given: str) -> int:
    count = int(given)
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {given}")
    return count


def _counts(given: str) -> list[int]:
    return [_count(each) for each in given.split(",")]


def _pairs(given: str) -> list[tuple[str, str]]:
    found = [tuple(pair.split(":")) for pair in given.split(",")]
    if any(len(pair) != 2 for pair in found):
        raise argparse.ArgumentTypeError(f"must be STUDENT:TEACHER, separated by commas, got {given!r}")
    return [(student, teacher) for student, teacher in found]


def _model(given: str) -> tuple[str, Model]:
    name, _, sizes = given.partition("=")
    layers, hidden, *tied = sizes.split(":")
    if tied not in ([], ["tied"]):
        raise argparse.ArgumentTypeError(f"must be NAME=LAYERS:HIDDEN or NAME=LAYERS:HIDDEN:tied, got {given!r}")
    return name, Model(int(float(layers)), _count(hidden), bool(tied))


if __name__ == "__main__":
    main()
