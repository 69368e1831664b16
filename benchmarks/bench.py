"""``python benchmarks/bench.py``: measure the benchmarks again, and write their page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Annotated

import measurements
from benchmark_page import page
from tyro.conf import arg

from lorascope.cli.arguments import call
from lorascope.files.printable import count_phrase, printable
from lorascope.schema.suggestions import unknown_name

ROOT = Path(__file__).parents[1]
PAGE, STORED = "docs/benchmarks.md", "data/benchmarks.json"


def measure(
    names: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = (),
    /,
    *,
    pairs: Annotated[int, arg(metavar="N")] = measurements.PAIRS,
    write: bool = False,
    json: bool = False,
) -> int:
    """Measure times and memory, and compare each number with its aim.

    Every benchmark is a script in this folder. All of them take an hour and a half on two cores,
    on which nothing else should run. The exit code is 1 if a script fails; a missed aim is only reported.

    Example: python benchmarks/bench.py lora_step recorder

    Parameters
    ----------
    names
        Benchmarks, such as lora_step; all if omitted.
    pairs
        Number of paired measurements of a fast contestant; slow ones have fewer.
    write
        Store the results in data/benchmarks.json, and write docs/benchmarks.md from it.
    json
        Print the results as JSON, with machine and versions.
    """
    scripts = measurements.find_scripts(ROOT / "benchmarks")
    for name in names:
        if name not in scripts:
            raise ValueError(unknown_name("benchmark", name, scripts))
    if pairs < 1:
        raise ValueError(f"--pairs must be >= 1, got {pairs}")
    stored = ROOT / STORED
    kept = measurements.read(stored) if write else {}
    measured: dict[str, measurements.Measurement] = {}
    failed = 0
    for name in dict.fromkeys(names or scripts):
        measurement = measurements.begin()
        if measurement.load > measurements.BUSY:
            busy = f"{name}: other work uses {measurement.load:g} cores of this machine, which widens the intervals"
            print(busy, file=sys.stderr, flush=True)
        try:
            for line in measurements.run_script(scripts[name], pairs):
                measurement.lines.append(line)
                if not json:
                    print(measurements.text(line), flush=True)
        except ChildProcessError as error:
            failed += 1
            print(f"{name} failed: {printable(error)}", file=sys.stderr, flush=True)
            continue
        measured[name] = measurement
        if write:
            kept[name] = measurement
            measurements.write(stored, kept)
            (ROOT / PAGE).write_text(page(kept, scripts), encoding="utf-8")
    if json:
        print(dumps(measurements.to_json(measured), ensure_ascii=False))
    else:
        verdicts = [line.verdict for each in measured.values() for line in each.lines]
        missed = verdicts.count("missed")
        print(f"{verdicts.count('met')} of {count_phrase(verdicts.count('met') + missed, 'aim')} met.")
    return 1 if failed else 0


def main(argv: Sequence[str]) -> int:
    """Run a command line and return its exit code: 2 for wrong arguments, which get one line."""
    try:
        return call(measure, "bench", argv)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
