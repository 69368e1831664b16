"""``lorascope export``: export of ranks and adapters to PEFT and other formats, and of tables to files."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from json import dumps
from typing import Annotated, Any, Literal

from tyro.conf import arg

from lorascope import export
from lorascope.cli.arguments import File, Folder, Name, command, reject
from lorascope.cli.opened_runs import open_runs
from lorascope.export import RankBudget
from lorascope.export.conversion import require_adapter
from lorascope.export.scaled_parts import parse_scales
from lorascope.files.printable import printable
from lorascope.files.text_layout import WIDTH, wrap_paragraph
from lorascope.runs.lora_config import next_lora_keywords
from lorascope.runs.rank_grid import rank_grid
from lorascope.runs.result import Result

_ROUTER = "Ranks and scales that one token sees: a plain LoRA has neither the router nor the experts of this HydraLoRA."
_NO_LOSS = "Singular values do not show the effect on the task: measure the loss with --model NAME --task NAME."
_SAME_ALPHA = "Every module keeps its alpha, so its scale alpha / rank grows as its rank falls."
_OTHER_LOSS = "A LoRA trained from scratch at these ranks ends at a different loss."
_ELSEWHERE = (
    "Published results of LoRAs trained at a smaller rank from the start: GLUE mean 88.34 at rank 8, 88.15 at rank 2 "
    "(DeBERTaV3-base); XSum ROUGE-2 20.72, 20.20 at half the rank (BART-large); arXiv 2303.10512, tables 1 and 3.",
    "These are other models and tasks, and none of the adapters was pruned: they do not predict the result here.",
)


@command
def main(
    runs: Annotated[tuple[str, ...], arg(metavar="RUN ...")] = (),
    /,
    *,
    base: Folder = None,
    rank_pattern: bool = False,
    budget: Annotated[float | None, arg(metavar="F")] = None,
    by: Literal["energy", "ablation"] = "energy",  # names: ok
    model: Name = None,
    task: Name = None,
    scales: File = None,
    peft: Folder = None,
    kohya: File = None,
    diffusers: Annotated[str | None, arg(metavar="PATH")] = None,
    mlx: Folder = None,
    component: Name = None,
    weights: Annotated[tuple[float, ...], arg(metavar="W ...")] = (),
    table: File = None,
    summary: bool = False,
    state: Annotated[str, arg(metavar="NAME")] = "last",
    json: bool = False,
) -> int:
    """Export ranks or an adapter to PEFT or another format, or tables to files.

    Ranks are printed as a PEFT configuration for a next LoRA; with --budget, also the energy and error of the kept
    components. A PEFT folder has a README.md that shows how to load it. Other formats get the same numbers, and an
    adapter that they cannot represent exactly is refused.

    Example: lorascope export runs/lora --rank-pattern --budget 0.5, or lorascope export runs/lora --peft my-adapter

    Parameters
    ----------
    runs
        Run or adapter: a folder, a .safetensors file, or a name on the Hugging Face Hub. Several adapters of one base
        are summed with --peft, --kohya, --diffusers or --mlx.
    base
        Base model of the adapter; required for FourierFT, whose files have no shapes, for names with underscores, and
        to write PiSSA or OLoRA of PEFT.
    rank_pattern
        Print the run's ranks and alphas as a peft.LoraConfig for a next LoRA.
    budget
        With --rank-pattern or an adapter to write: fraction of all ranks to keep (0.5), or total rank to keep (96).
    by
        With --budget: keep components by energy (squared singular values), or by loss increase when ablated.
    model
        With --budget: base model for measuring the loss: minilm, smollm2, a folder, a GGUF file or a Hub id.
    task
        With --model: sentiment, a CSV, JSONL or Parquet file, a folder of images by label, or a Hugging Face dataset.
    scales
        With --peft: scale parts of the update, such as whole=0.75, or all as in this table of lorascope dial.
    peft
        Write the adapter to this new folder; with --budget, the best approximation by the components that are kept.
    kohya
        Write the adapter to this new .safetensors file, with the names and alphas of kohya's trainer for image models.
    diffusers
        Write the adapter to this new .safetensors file, or to a new folder as save_lora_weights does.
    mlx
        Write the adapter of a language model to this new folder, for mlx-lm.
    component
        With --kohya or --diffusers: component of the pipeline that a PEFT adapter belongs to, such as text_encoder_2;
        by default it follows from the names of its modules.
    weights
        With several adapters: weight of each in the sum (default: 1 each).
    table
        Write the table of all records to this new .csv, .parquet or .json file.
    summary
        With --table: write one row per module instead of all records.
    state
        Saved state: last or best.
    json
        Print JSON; remarks go to stderr.
    """
    paths = {"peft": peft, "kohya": kohya, "diffusers": diffusers, "mlx": mlx}
    written = {format: path for format, path in paths.items() if path is not None}
    is_image = kohya is not None or diffusers is not None
    is_sum, selects_state = len(runs) > 1, state != "last"
    forms = [rank_pattern, table is not None].count(True) + len(written)
    reject(
        {
            "RUN is required: lorascope export runs/lora --rank-pattern": not runs,
            "several adapters require --peft DIR or another format, which writes their sum": is_sum and not written,
            "--weights requires several adapters": bool(weights) and len(runs) < 2,
            "exactly one of --rank-pattern, --peft DIR, --kohya FILE, --diffusers PATH, --mlx DIR and --table FILE is "
            f"required, got {forms}": forms != 1,
            "--component requires --kohya or --diffusers": component is not None and not is_image,
            "--summary requires --table": summary and table is None,
            "--state requires --summary with --table: the table of all records has every step": table is not None
            and selects_state
            and not summary,
            "--budget requires --rank-pattern or --peft, --kohya, --diffusers or --mlx": budget is not None
            and not (rank_pattern or written),
            "--model and --task require each other: the loss is measured with both": (model is None) != (task is None),
            "--by ablation requires --model NAME and --task NAME": by == "ablation" and model is None,
            "--scales requires one run with --peft DIR, and no --budget": scales is not None
            and (peft is None or is_sum or budget is not None),
            "--model requires --budget": model is not None and budget is None,
            "--by, --model and --task require one adapter or run": is_sum and model is not None,
            "--state requires one run, with --rank-pattern, --peft or --summary": selects_state
            and (is_sum or bool(written and peft is None)),
        }
    )
    adapters = open_runs(runs, base)
    if len(adapters) > 1:
        ((format, out),) = written.items()
        return _write_sum(adapters, format, out, component, weights or None, budget, json)
    (opened,) = adapters
    scores = None
    if by == "ablation" and model is not None and task is not None:
        from lorascope.experiments.component_importance import component_importance  # imports torch

        scores = component_importance(opened, model, task, state=state)
    if rank_pattern:
        if budget is None:
            keywords, remarks = export.rank_pattern(opened, state=state), []
            grid = rank_grid(opened.modules, opened.ranks(state))
            if opened.input_dependent_modules(state):
                remarks.append(_ROUTER)
        else:
            selection = export.select_components(opened, budget, state, scores)
            keywords = next_lora_keywords(opened, selection.ranks, opened.updates(state=state))
            grid = rank_grid(opened.modules, opened.ranks(state), selection.ranks)
            losses = _loss_remarks(opened, selection, model, task, state)
            remarks = [*_budget_remarks(selection, is_minimal=by == "energy"), _SAME_ALPHA, *losses, *_ELSEWHERE]
        return _print_ranks(grid, keywords, remarks, json)
    if peft is not None:
        parts = None if scales is None else parse_scales(scales, opened)
        path = export.to_peft(opened, peft, state, budget, scores, parts)
    elif written:
        ((format, out),) = written.items()
        path = export.convert(require_adapter(opened), out, format, budget, scores, component)
    else:
        path = export.to_table(opened, str(table), summary, state)
    print(dumps({"id": opened.id, "path": str(path)}) if json else printable(path))
    return 0


def _write_sum(
    adapters: Sequence[Result],
    format: str,
    out: str,
    component: str | None,
    weights: Sequence[float] | None,
    budget: float | None,
    json: bool,
) -> int:
    """Print how the adapters interfere, and write their sum."""
    summed = list(map(require_adapter, adapters))
    for row in export.interference(summed, weights).to_dict("records"):
        change = f"cosine {row['cosine']:.3f}, energy of the sum / sum of energies {row['energy']:.3f}"
        remark = f"{row['one']} + {row['other']}: {row['shared']} shared modules, {change}"
        _print_remark(remark, json)
    path = export.sum_adapters(summed, out, weights, budget, format, component)
    print(dumps({"path": str(path)}) if json else printable(path))
    return 0


def _budget_remarks(selection: RankBudget, is_minimal: bool) -> list[str]:
    """Return number, energy and error of the components that a budget keeps."""
    table = selection.modules
    total = table[["rank", "kept", "parameters", "parameters_kept"]].sum()
    worst = table.iloc[int(table["share"].argmin())]
    optimal = ", the minimum for these ranks" if is_minimal else ""
    return [
        f"Kept: {total['kept']:,} of {total['rank']:,} components, in {(table['kept'] > 0).sum()} of {len(table)} "
        f"modules; {total['parameters_kept']:,} of {total['parameters']:,} parameters.",
        f"Energy kept (squared singular values): {selection.energy:.1%}; "
        f"lowest in {worst['module']}: {worst['share']:.1%}.",
        f"Relative error of the pruned adapter (Frobenius): {selection.error:.1%}{optimal}; "
        f"{worst['error']:.1%} in that module.",
    ]


def _loss_remarks(opened: Result, selection: RankBudget, model: str | None, task: str | None, state: str) -> list[str]:
    """Return the loss before and after pruning, or how to measure it if no model and task are given."""
    if model is None or task is None:
        return [_NO_LOSS]
    from lorascope.experiments.component_importance import pruned_losses  # imports torch

    before, after, texts = pruned_losses(opened, selection, model, task, state=state)
    measured = f"{before:.4f} before pruning, {after:.4f} after."
    return [f"Loss on {texts} validation texts not used for selection: {measured}", _OTHER_LOSS]


def _print_ranks(grid: Sequence[str], keywords: Mapping[str, Any], remarks: Sequence[str], json: bool) -> int:
    """Print ranks by role and layer as comments, a peft.LoraConfig as Python or JSON, and remarks as comments."""
    if json:
        print(dumps(keywords, indent=1))
    else:  # JSON and Python write these values in the same way
        for line in grid:
            print(printable(f"# {line}"))
        lines = [f"    {key}={dumps(value, indent=4)},".replace("\n", "\n    ") for key, value in keywords.items()]
        print("from peft import LoraConfig", "", "config = LoraConfig(", *lines, ")", sep="\n")
    for remark in remarks:
        _print_remark(remark, json)
    return 0


def _print_remark(remark: str, json: bool) -> None:
    """Print a remark as a comment of Python, or to stderr next to JSON."""
    print(wrap_paragraph(f"# {remark}", width=WIDTH, hang="#   "), file=sys.stderr if json else sys.stdout)
