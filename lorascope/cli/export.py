"""``lorascope export``: a run for PEFT, as the ranks of a next LoRA or as an adapter folder, and its tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from lorascope.cli.arguments import UsageError, parse
from lorascope.cli.load_runs import open_runs
from lorascope.files.printable import printable
from lorascope.runs.export import RankBudget, rank_pattern, select_components, to_peft, to_table
from lorascope.runs.run import Run
from lorascope.runs.summary import peft_keywords

_BUDGET = "with --rank-pattern: keep this share of all ranks (0.5), or this sum of ranks (96)"
_BY = "with --budget: keep the components of most energy, or those whose ablation raises the loss most"
_MODEL = "with --budget: the base, on which loss is measured: minilm, smollm2, a folder, a GGUF file or a hub id"
_TASK = (
    "with --model: sentiment, a CSV, JSONL or Parquet file, a folder of images by label, or a name that datasets knows"
)
_BASE = "folder of the base model of an adapter: FourierFT's needs it, since it keeps no shapes"
_ROUTER = "Ranks and scales of what a token sees: a plain LoRA has neither the router nor the heads of this HydraLoRA."
_ELSEWHERE = (
    "From elsewhere, LoRAs trained at a smaller rank from the start: mean of GLUE 88.34 at rank 8, 88.15 at rank 2 "
    "(DeBERTaV3-base); ROUGE-2 of XSum 20.72, at half the rank 20.20 (BART-large); arXiv 2303.10512, tables 1 and 3.",
    "Other models, other tasks, and none of them was cut: they are no forecast for this one.",
)
_TABLE = "write the table of all records into this new file, by its ending as .csv, .parquet or .json"


@dataclass(frozen=True)
class Options:
    """Hand a run over: print its ranks as PEFT configures a next LoRA, write its adapter as a folder, or its tables.

    The README.md in the folder tells how to load it. Under a budget, what it keeps is told with the ranks.

    Example: lorascope export runs/lora --rank-pattern --budget 0.5, or lorascope export runs/lora --peft my-adapter
    """

    run: Annotated[Positional[str | None], arg(metavar="RUN", help="folder of a run, or of an adapter")] = None
    base: Annotated[str | None, arg(metavar="DIR", help=_BASE)] = None
    rank_pattern: Annotated[bool, arg(help="print what peft.LoraConfig takes")] = False
    budget: Annotated[float | None, arg(metavar="F", help=_BUDGET)] = None
    by: Annotated[Literal["energy", "ablation"], arg(help=_BY)] = "energy"
    model: Annotated[str | None, arg(metavar="NAME", help=_MODEL)] = None
    task: Annotated[str | None, arg(metavar="NAME", help=_TASK)] = None
    peft: Annotated[str | None, arg(metavar="DIR", help="write the adapter into this new folder")] = None
    table: Annotated[str | None, arg(metavar="FILE", help=_TABLE)] = None
    summary: Annotated[bool, arg(help="with --table: the table with a row a module, in place of all records")] = False
    state: Annotated[str, arg(metavar="NAME", help="last or best")] = "last"
    json: Annotated[bool, arg(help="for a program; what is told beside it goes to stderr then")] = False


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    options = parse(Options, argv, "lorascope export")
    _check_export_options(options)
    (run,) = open_runs([str(options.run)], options.base)
    if options.peft is not None or options.table is not None:
        path = _write_export(run, options)
        print(json.dumps({"id": run.id, "path": str(path)}) if options.json else printable(path))
        return 0
    if options.budget is None:
        keywords = rank_pattern(run, state=options.state)
        remarks = [_ROUTER] if run.input_dependent_modules(options.state) else []
    else:
        keywords, remarks = _suggest_ranks(run, options, options.budget)
    print(json.dumps(keywords, indent=1) if options.json else _snippet(keywords))
    for remark in remarks:
        print(f"# {printable(remark)}", file=sys.stderr if options.json else sys.stdout)
    return 0


def _check_export_options(options: Options) -> None:
    if options.run is None:
        raise UsageError("export what? Give a run: lorascope export runs/lora --rank-pattern")
    if [options.rank_pattern, options.peft is not None, options.table is not None].count(True) != 1:
        raise UsageError("export as what? Give one of --rank-pattern, --peft DIR and --table FILE")
    if options.summary and options.table is None:
        raise UsageError("--summary goes with --table: it says which table")
    if options.table is not None and options.state != "last" and not options.summary:
        raise UsageError("--state goes with --summary here: the table of all records holds every step")
    if options.budget is not None and not options.rank_pattern:
        raise UsageError("--budget goes with --rank-pattern: all else is written as it is")
    if (options.model is None) != (options.task is None):
        raise UsageError("--model and --task go together: a loss needs the base and its texts")
    if options.by == "ablation" and options.model is None:
        raise UsageError("--by ablation takes components out of a model: give --model NAME and --task NAME")
    if options.model is not None and options.budget is None:
        raise UsageError("--model goes with --budget: without one nothing is cut")


def _write_export(run: Run, options: Options) -> Path:
    if options.table is not None:
        return to_table(run, options.table, options.summary, options.state)
    return to_peft(run, str(options.peft), options.state)


def _suggest_ranks(run: Run, options: Options, budget: float) -> tuple[dict[str, Any], list[str]]:
    """The configuration that a budget allows, and what it keeps in words."""
    state = options.state
    if options.model is None or options.task is None:
        chosen = select_components(run, budget, state)
        priced = ["What that costs the task no spectrum says: --model NAME --task NAME measures the loss."]
    else:
        from lorascope.experiments import component_importance  # imports torch

        by_ablation = options.by == "ablation"
        scores = None
        if by_ablation:
            scores = component_importance.component_importance(run, options.model, options.task, state=state)
        chosen = select_components(run, budget, state, scores)
        before, after, texts = component_importance.pruned_losses(run, chosen, options.model, options.task, state=state)
        priced = [
            f"Its loss on {texts} validation texts that chose nothing: {before:.4f} whole, {after:.4f} cut.",
            "A LoRA that is trained anew at these ranks ends elsewhere.",
        ]
    keywords = peft_keywords(run, chosen.ranks, run.updates(state=state))
    return keywords, [*format_budget(chosen, options.by), *priced, *_ELSEWHERE]


def format_budget(chosen: RankBudget, by: str) -> list[str]:
    table = chosen.modules
    total = table[["rank", "kept", "parameters", "parameters_kept"]].sum()
    worst = table.iloc[int(table["share"].argmin())]
    least = ", the least that these ranks allow" if by == "energy" else ""
    return [
        f"Kept: {total['kept']:,} of {total['rank']:,} components, in {(table['kept'] > 0).sum()} of {len(table)} "
        f"modules; {total['parameters_kept']:,} of {total['parameters']:,} parameters.",
        f"Energy kept (squared singular values): {chosen.energy:.1%}; "
        f"least in {worst['module']}, {worst['share']:.1%}.",
        f"So the adapter, cut to that, would differ from itself by {chosen.error:.1%} of its norm (Frobenius){least}; "
        f"that module by {worst['error']:.1%}.",
    ]


def _snippet(keywords: Mapping[str, Any]) -> str:
    """Python that makes the configuration; what JSON writes of such values is Python too."""
    lines = [f"    {key}={json.dumps(value, indent=4)}".replace("\n", "\n    ") for key, value in keywords.items()]
    return "\n".join(["from peft import LoraConfig", "", "config = LoraConfig(", *(f"{line}," for line in lines), ")"])
