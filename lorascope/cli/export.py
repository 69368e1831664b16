"""``lorascope export``: export of ranks or an adapter to PEFT, and of tables to files."""

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
from lorascope.runs.result import Result
from lorascope.runs.summary import peft_keywords

_BUDGET = "with --rank-pattern: fraction of all ranks to keep (0.5), or total rank to keep (96)"
_BY = "with --budget: keep components by energy (squared singular values), or by loss increase when ablated"
_MODEL = "with --budget: base model for measuring the loss: minilm, smollm2, a folder, a GGUF file or a Hub id"
_TASK = "with --model: sentiment, a CSV, JSONL or Parquet file, a folder of images by label, or a Hugging Face dataset"
_BASE = "folder of the adapter's base model; required for FourierFT, whose files have no shapes"
_ROUTER = "Ranks and scales that one token sees: a plain LoRA has neither the router nor the experts of this HydraLoRA."
_ELSEWHERE = (
    "Published results of LoRAs trained at a smaller rank from the start: GLUE mean 88.34 at rank 8, 88.15 at rank 2 "
    "(DeBERTaV3-base); XSum ROUGE-2 20.72, 20.20 at half the rank (BART-large); arXiv 2303.10512, tables 1 and 3.",
    "These are other models and tasks, and none of the adapters was pruned: they do not predict the result here.",
)
_TABLE = "write the table of all records to this new .csv, .parquet or .json file"


@dataclass(frozen=True)
class Options:
    """Export ranks or an adapter to PEFT, or tables to files.

    Ranks are printed as a PEFT configuration for a next LoRA; with --budget, also the energy and error of the kept
    components. An adapter is written as a folder whose README.md shows how to load it.

    Example: lorascope export runs/lora --rank-pattern --budget 0.5, or lorascope export runs/lora --peft my-adapter
    """

    run: Annotated[Positional[str | None], arg(metavar="RUN", help="folder of a run or adapter")] = None
    base: Annotated[str | None, arg(metavar="DIR", help=_BASE)] = None
    rank_pattern: Annotated[bool, arg(help="print the run's ranks as a peft.LoraConfig")] = False
    budget: Annotated[float | None, arg(metavar="F", help=_BUDGET)] = None
    by: Annotated[Literal["energy", "ablation"], arg(help=_BY)] = "energy"
    model: Annotated[str | None, arg(metavar="NAME", help=_MODEL)] = None
    task: Annotated[str | None, arg(metavar="NAME", help=_TASK)] = None
    peft: Annotated[str | None, arg(metavar="DIR", help="write the adapter to this new folder")] = None
    table: Annotated[str | None, arg(metavar="FILE", help=_TABLE)] = None
    summary: Annotated[bool, arg(help="with --table: write one row per module instead of all records")] = False
    state: Annotated[str, arg(metavar="NAME", help="saved state: last or best")] = "last"
    json: Annotated[bool, arg(help="print JSON; remarks go to stderr")] = False


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
    print(json.dumps(keywords, indent=1) if options.json else _config_code(keywords))
    for remark in remarks:
        print(f"# {printable(remark)}", file=sys.stderr if options.json else sys.stdout)
    return 0


def _check_export_options(options: Options) -> None:
    if options.run is None:
        raise UsageError("RUN is required: lorascope export runs/lora --rank-pattern")
    forms = [options.rank_pattern, options.peft is not None, options.table is not None].count(True)
    if forms != 1:
        raise UsageError(f"exactly one of --rank-pattern, --peft DIR and --table FILE is required, got {forms}")
    if options.summary and options.table is None:
        raise UsageError("--summary requires --table")
    if options.table is not None and options.state != "last" and not options.summary:
        raise UsageError("--state requires --summary with --table: the table of all records has every step")
    if options.budget is not None and not options.rank_pattern:
        raise UsageError("--budget requires --rank-pattern")
    if (options.model is None) != (options.task is None):
        raise UsageError("--model and --task require each other: the loss is measured with both")
    if options.by == "ablation" and options.model is None:
        raise UsageError("--by ablation requires --model NAME and --task NAME")
    if options.model is not None and options.budget is None:
        raise UsageError("--model requires --budget")


def _write_export(run: Result, options: Options) -> Path:
    if options.table is not None:
        return to_table(run, options.table, options.summary, options.state)
    return to_peft(run, str(options.peft), options.state)


def _suggest_ranks(run: Result, options: Options, budget: float) -> tuple[dict[str, Any], list[str]]:
    """Return the PEFT keywords that a budget allows, and remarks on the kept components."""
    state = options.state
    if options.model is None or options.task is None:
        chosen = select_components(run, budget, state)
        loss = ["Singular values do not show the effect on the task: measure the loss with --model NAME --task NAME."]
    else:
        from lorascope.experiments import component_importance  # imports torch

        by_ablation = options.by == "ablation"
        scores = None
        if by_ablation:
            scores = component_importance.component_importance(run, options.model, options.task, state=state)
        chosen = select_components(run, budget, state, scores)
        before, after, texts = component_importance.pruned_losses(run, chosen, options.model, options.task, state=state)
        loss = [
            f"Loss on {texts} validation texts not used for selection: {before:.4f} before pruning, {after:.4f} after.",
            "A LoRA trained from scratch at these ranks ends at a different loss.",
        ]
    keywords = peft_keywords(run, chosen.ranks, run.updates(state=state))
    return keywords, [*format_budget(chosen, options.by), *loss, *_ELSEWHERE]


def format_budget(chosen: RankBudget, by: str) -> list[str]:
    """Return remarks on the components that a budget keeps: number, energy and error."""
    table = chosen.modules
    total = table[["rank", "kept", "parameters", "parameters_kept"]].sum()
    worst = table.iloc[int(table["share"].argmin())]
    optimal = ", the minimum for these ranks" if by == "energy" else ""
    return [
        f"Kept: {total['kept']:,} of {total['rank']:,} components, in {(table['kept'] > 0).sum()} of {len(table)} "
        f"modules; {total['parameters_kept']:,} of {total['parameters']:,} parameters.",
        f"Energy kept (squared singular values): {chosen.energy:.1%}; "
        f"lowest in {worst['module']}: {worst['share']:.1%}.",
        f"Relative error of the pruned adapter (Frobenius): {chosen.error:.1%}{optimal}; "
        f"{worst['error']:.1%} in that module.",
    ]


def _config_code(keywords: Mapping[str, Any]) -> str:
    """Return Python code that creates the configuration; JSON and Python write these values in the same way."""
    lines = [f"    {key}={json.dumps(value, indent=4)}".replace("\n", "\n    ") for key, value in keywords.items()]
    return "\n".join(["from peft import LoraConfig", "", "config = LoraConfig(", *(f"{line}," for line in lines), ")"])
