"""``lorascope export``: a run for PEFT, as the ranks of a next LoRA or as an adapter folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import Positional, arg

from lorascope.checkpoints import load
from lorascope.commands.arguments import UsageError, parse
from lorascope.export import rank_pattern, to_peft

_BUDGET = "with --rank-pattern: keep this share of all ranks (0.5), or this sum of ranks (96), by singular value"


@dataclass(frozen=True)
class Options:
    """Hand a run over to PEFT: print its ranks as the configuration of a next LoRA, or write its adapter as a folder.

    The README.md in the folder tells how to load it.

    Example: lorascope export runs/lora --rank-pattern --budget 0.5, or lorascope export runs/lora --peft my-adapter
    """

    run: Annotated[Positional[str | None], arg(metavar="RUN", help="folder of a run, or of an adapter")] = None
    rank_pattern: Annotated[bool, arg(help="print what peft.LoraConfig takes")] = False
    budget: Annotated[float | None, arg(metavar="F", help=_BUDGET)] = None
    peft: Annotated[str | None, arg(metavar="DIR", help="write the adapter into this new folder")] = None
    state: Annotated[str, arg(metavar="NAME", help="last or best")] = "last"
    json: Annotated[bool, arg(help="for a program")] = False


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    options = parse(Options, argv, "lorascope export")
    if options.run is None:
        raise UsageError("export what? Give a run: lorascope export runs/lora --rank-pattern")
    if options.rank_pattern == (options.peft is not None):
        raise UsageError("export as what? Give either --rank-pattern or --peft DIR")
    if options.budget is not None and not options.rank_pattern:
        raise UsageError("--budget goes with --rank-pattern: an adapter is written as it was trained")
    run = load(options.run)
    if options.peft is not None:
        path = to_peft(run, options.peft, options.state)
        print(json.dumps({"id": run.id, "path": str(path)}) if options.json else path)
        return 0
    keywords = rank_pattern(run, options.budget, options.state)
    print(json.dumps(keywords, indent=1) if options.json else _snippet(keywords))
    return 0


def _snippet(keywords: Mapping[str, Any]) -> str:
    """Python that makes the configuration; what JSON writes of such values is Python too."""
    lines = [f"    {key}={json.dumps(value, indent=4)}".replace("\n", "\n    ") for key, value in keywords.items()]
    return "\n".join(["from peft import LoraConfig", "", "config = LoraConfig(", *(f"{line}," for line in lines), ")"])
