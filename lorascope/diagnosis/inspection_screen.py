"""Screens of 80 columns: the frame of every report with its strip of layers, and the screens of one adapter or run."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console, RenderableType
from rich.text import Text

from lorascope.analysis.rank_use import SHARE, ModuleUse, RankUse
from lorascope.diagnosis.case import Case, largest_rows
from lorascope.diagnosis.causes.finding import Finding
from lorascope.diagnosis.inspection import Facts, Inspection
from lorascope.diagnosis.layer_strips import Modules, Strip, layer_strip
from lorascope.diagnosis.null import below_null, outliers
from lorascope.files.hub import model_name
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.printable import count_phrase, printable
from lorascope.files.text_layout import (
    LABEL_WIDTH,
    WIDTH,
    Block,
    Elided,
    TableColumn,
    aligned_table,
    block_grid,
    elide,
    format_count,
    format_norm,
    format_number,
    format_percent,
    format_span,
    format_whole_number,
    render_text,
    text_block,
    wrap_paragraph,
)
from lorascope.runs.adapter import Adapter
from lorascope.runs.finding_lines import describe_effective_ranks
from lorascope.runs.module_summary import column, mean_without_nan, pool_norms
from lorascope.runs.result import Result
from lorascope.updates import LowRank

_ROUNDED_RANK = 1e-6
_LISTED_MODULES = 3  # modules per block, so that a screen stays below 45 lines
_FAULTS = {"nan-norms", "no-update", "zero-updates", "unmatched"}
"""Causes of findings that ``lorascope doctor`` explains."""
_SHOWN_CAUSES = {"unused-rank", "full-rank"}
"""Causes of findings that the screen shows in separate blocks."""
SEVERITY_STYLES = {"error": "red", "caution": "yellow", "note": "yellow"}


def report_screen(
    target: Console,
    header: Sequence[Block],
    *body: RenderableType,
    blocks: Sequence[Block] = (),
    findings: Sequence[Finding] = (),
    command: str = "",
) -> str:
    """Format an inspection screen: header, body, blocks, findings, and the command to run next."""
    end = [*blocks, Block("findings", list(map(finding_paragraph, findings)))]
    return add_command(render_text(target, block_grid(header), "", *body, "", block_grid(end)), target, command)


def add_command(screen: str, target: Console, command: str) -> str:
    """Return a screen with the command to run next in its last line, if there is one."""
    if not command:
        return screen
    with target.capture() as captured:  # without wrapping, because a wrapped command cannot be copied
        target.print(Text.assemble("next".ljust(LABEL_WIDTH), (command, "cyan")), soft_wrap=True)
    return f"{screen}\n{captured.get().rstrip()}"


def header_blocks(facts: Facts) -> list[Block]:
    """Return the header of an inspection screen: facts of one line each, the first with its label in bold."""
    # Paths of base models are long: wrapped, they would take the room of the strips.
    first, *other_blocks = (Block(elide(label, LABEL_WIDTH - 1), [Elided(text)]) for label, text in facts)
    return [first._replace(label_style="bold"), *other_blocks]


def finding_paragraph(finding: Finding) -> Text:
    """Return the message of a finding for an inspection screen in the color of its severity."""
    return wrap_paragraph(finding.message, SEVERITY_STYLES[finding.severity], hang="  ")


def inspection_screen(inspection: Inspection, target: Console, null: pd.DataFrame | None = None) -> str:
    """Format the inspection screen of one adapter or run, with the table of ``null_table`` if there is one."""
    ranks = [
        TableColumn("rank", 6, "least_rank", format_span, "most_rank"),
        TableColumn("effective", 9, "effective_rank", format_number),
    ]
    use, norms = inspection.rank_use, _size_columns(inspection)
    body: list[RenderableType] = []
    blocks: list[Block] = []
    if use is None:
        norms += ranks
    else:
        strips, used = (
            _rank_strips(inspection, use),
            TableColumn("used", 7, "used_rank", format_count, "allocated_rank"),
        )
        # Two strips leave no room for numbers, which are then next to the norms.
        numbers = [used, *ranks]
        if len(strips) > 1:
            numbers, norms = [], [*norms, used, TableColumn("eff", 6, "effective_rank", format_number)]
        body += [*layer_strip(inspection, target, strips, numbers), ""]
        blocks += _rank_blocks(inspection, use)
    norm_strip = Strip("|dW| by layer", _pool_layers, "{} per layer", pooled=" (RMS)")
    body += layer_strip(inspection, target, [norm_strip], norms)
    lines = []
    for module in largest_rows(inspection.measured, "update_norm", 3):
        rank = ""
        if not math.isnan(module.effective_rank):
            rank += f"  rank {format_number(module.effective_rank)}"
            # The update of DoRA with W_0 has a higher rank than its direction, which is the rank of the module.
            if module.rank is not None and module.effective_rank <= module.rank + _ROUNDED_RANK:
                rank += f" of {module.rank}"
        lines.append(Elided(module.module, f"{format_norm(module.update_norm):<6} ", rank))
    blocks.append(Block("largest |dW|", lines))
    if null is not None:
        blocks += _null_blocks(null)
    findings = [finding for finding in inspection.details if finding.cause not in _SHOWN_CAUSES]
    header, command = header_blocks(inspection.facts), next_command(inspection)
    return report_screen(target, header, *body, blocks=blocks, findings=findings, command=command)


def _rank_strips(inspection: Inspection, use: RankUse) -> list[Strip]:
    """Return the strip of used rank and, if ranks differ and there is no room for numbers, that of allocated rank."""
    uses = {module.module: module for module in use.modules}

    def count(modules: Modules) -> RankUse:
        return RankUse([uses[name] for name in column(modules, "module") if name in uses])

    def fraction(modules: Modules) -> float:
        cell = count(modules)
        if not cell.modules:
            return math.nan
        return cell.used / (cell.allocated or 1)

    def text(modules: Modules) -> str:
        cell = count(modules)
        if not cell.modules:
            return "!"
        return format_count(cell.used, cell.allocated)

    energy = f"{SHARE:.0%} of the energy"
    strip = Strip(
        "used rank",
        fraction,
        f"all of the rank for {energy}",
        text=text,
        text_caption=f"used components have {energy} of their module",
        largest=1.0,
        low=0.5,
    )
    modules = [module for module in inspection.module_rows() if module["layer"] is not None]
    if len({module.rank for module in use.modules}) == 1 or strip.layer_texts(modules):
        return [strip]
    return [strip, Strip("rank by layer", _mean_rank, "rank {}", format_number, pooled=" (mean)")]


def _mean_rank(modules: Modules) -> float:
    return mean_without_nan([math.nan if rank is None else rank for rank in column(modules, "rank")])


def _rank_blocks(inspection: Inspection, use: RankUse) -> Iterator[Block]:
    """Yield the components in use, the modules with most unused rank, and those that use all of it."""
    if not use.used:
        return
    ranks = ((module.rank, module.effective_rank) for module in inspection.measured)
    yield text_block("rank", use.describe(), describe_effective_ranks(ranks))
    count = count_phrase(len(use.modules), "module")
    unused = _module_lines(use.half_unused, f"and {{}} more of {count} with half of their rank or less")
    yield Block("most unused", unused or [f"none of {count} uses half of its rank or less"])
    yield Block("full", [use.describe_full(), *_module_lines(use.full, "and {} more")])


def _module_lines(modules: Sequence[ModuleUse], remainder: str) -> list[RenderableType]:
    """Return a line for each of the first three modules, and one for the number of the others."""
    lines: list[RenderableType] = []
    for module in modules[:_LISTED_MODULES]:
        lines.append(Elided(module.module, f"{module.used} of {module.rank}  "))
    if len(modules) > _LISTED_MODULES:
        lines.append(remainder.format(len(modules) - _LISTED_MODULES))
    return lines


def next_command(inspection: Inspection) -> str:
    """Return the command that shows more about the findings of an inspection, for pasting into a shell."""
    causes, run, use = {finding.cause for finding in inspection.details}, inspection.run, inspection.rank_use
    folders = [inspection.path or Path()]
    if causes & _FAULTS:
        return shell_command("lorascope doctor {}", folders)
    base = run.base if isinstance(run, Adapter) else None
    case = Case(run)
    # The checkpoint to keep comes before what is measured of it.
    if case.has_gauge and case.stored_dial is None:
        return shell_command("lorascope plot kl {} -o kl.pdf", folders)
    if use is not None and _is_priced(run):
        model, task = _name_model(run), run.meta.task or "NAME"
        if base is not None:
            model = model_name(str(base.folder))
        model, task = shell_word(model), shell_word(task)
        instrument = f"{{}} --model {model} --task {task}"
        if use.needs_half and case.stored_price is None:
            # The same rank for all modules that has as many components in total.
            mean_use = math.ceil(use.used / len(use.modules))
            return shell_command(f"lorascope price {instrument} --ranks {mean_use}", folders)
        if case.stored_dial is not None and case.stored_reading is None:
            return shell_command(f"lorascope read {{}} --model {model} --rows {task}", folders)
        if base is not None and case.stored_dial is None and "intruders-unknown" not in causes:
            return shell_command(f"lorascope dial {instrument}", folders)
        if 2 * len(use.full) > len(use.modules) and case.stored_price is None:
            return shell_command(f"lorascope price {instrument}", folders)
    if isinstance(run, Adapter) and base is not None:
        if "intruders-unknown" in causes:
            return shell_command("lorascope inspect {} --spectra", [*folders, base.folder])
        if run.files.needs_base:
            folders.append(base.folder)
    figure = "spectrum"
    if use is not None and len({module.rank for module in use.modules}) > 1:
        figure = "rank_allocation"
    elif run.incomplete_updates() and not run.spectra:
        figure = "update_norm"
    return shell_command(f"lorascope plot {figure} {{}} -o {figure}.pdf", folders)


def _name_model(run: Result) -> str:
    """Return the base model of a run as ``--model`` takes it; NAME for an adapter, and for the first blocks of one."""
    if isinstance(run, Adapter) or re.search(r", first \d+ blocks$", run.meta.model):
        return "NAME"
    return run.meta.model


def _is_priced(run: Result) -> bool:
    """Return whether ``price`` and ``dial`` take a run: they add its products B A to the base model."""
    first = next(iter(run.updates().values()), None)
    return type(first) is LowRank and first.whole and not run.input_dependent_modules()


def _size_columns(inspection: Inspection) -> list[TableColumn]:
    """Return the columns of |dW|, and of |dW| / |W| if the weights are known, else of the energy."""
    relative = TableColumn("dW/W", 7, "relative_update", format_percent)
    energy = TableColumn("energy", 7, "energy", format_percent)
    return [TableColumn("|dW|", 7, "update_norm", format_norm), relative if inspection.has_base else energy]


def _pool_layers(modules: Modules) -> float:
    """Return the root mean square of |dW| over the layers of modules."""
    layers = set(column(modules, "layer"))
    return math.hypot(*column(modules, "update_norm")) / len(layers) ** 0.5


def _null_blocks(null: pd.DataFrame) -> Iterator[Block]:
    """Yield the ranks next to those of random factors, and the modules whose norm is an outlier."""
    compared = null.dropna(subset=["effective_rank_p"])
    lines = []
    if compared.empty:
        lines.append("no product of two factors of rank >= 2")
    else:
        for quantity in ("effective_rank", "stable_rank"):
            count, mean = int(below_null(null, quantity).sum()), compared[f"{quantity}_null"].mean()
            random = f"{quantity.replace('_', ' ')} of random factors: {format_number(mean)}"
            lines.append(f"{random}; lower in {count} of {len(compared)} modules")
    start = pool_norms(null["untrained_norm"])
    if null["untrained_norm"].isna().any():
        lines.append("|dW| before training: unknown for this kind of start")
    elif start:
        lines.append(f"|dW| before training: {format_norm(start)} (random coefficients)")
    yield Block("null", lines)
    far = outliers(null)
    modules: list[RenderableType] = []
    for row in far.head(3).to_dict("records"):
        modules.append(Elided(row["module"], f"z {row['norm_z']:<6.1f} "))
    count = int(null["norm_z"].notna().sum())
    if len(far) > 3:
        modules.append(f"and {len(far) - 3} more")
    elif not count:
        modules.append("needs five layers")
    elif far.empty:
        modules.append(f"norms of {count} modules with a role in five layers or more: none")
    yield Block("outliers", modules)


def modules_screen(inspection: Inspection, target: Console) -> str:
    """Format the inspection screen of one adapter or run with one line per module instead of the strips."""
    columns = [
        *_size_columns(inspection),
        TableColumn("rank", 4, "rank", format_span, "rank"),
        TableColumn("eff", 6, "effective_rank", format_number),
    ]
    # There is no room for both what a base adds and the other ranks.
    dead = TableColumn("dead", 4, "dead", format_whole_number)
    if inspection.has_base:
        intruders = TableColumn("intr", 4, "intruders", format_whole_number)
        columns += [dead, intruders, TableColumn("1-cos", 7, "neuron_median", format_norm)]
    else:
        stable_rank = TableColumn("stable", 6, "stable_rank", format_number)
        columns += [stable_rank, TableColumn("90%", 4, "energy_rank", format_whole_number), dead]
    modules = inspection.module_rows()
    width = WIDTH - sum((numbers.width or 0) + 1 for numbers in columns)
    shared = _shared_prefix(modules, width)
    head = elide(f"module of {shared}" if shared else "module", width)
    rows = [module | {"name": module["module"].removeprefix(f"{shared}.")} for module in modules]
    body = aligned_table([TableColumn(head, width, "name"), *columns], rows)
    return report_screen(target, header_blocks(inspection.facts), body, findings=inspection.details)


def _shared_prefix(modules: Modules, width: int) -> str:
    """Return what the names of all modules in layers begin with if one is too long; else ""."""
    # Cut in the middle, long names would lose their layer; without their common prefix they do not.
    if len(modules) < 2 or max(map(len, column(modules, "module"))) <= width:
        return ""
    names = [module["module"].split(".") for module in modules if module["layer"] is not None]
    shared = []
    for words in zip(*names, strict=False):
        if len(set(words)) > 1:
            break
        shared.append(words[0])
    return ".".join(shared)


def shell_command(command: str, paths: Sequence[str | Path]) -> str:
    """Return a command with paths, the second after ``--base``, for pasting into a shell."""
    return command.format(" --base ".join(map(shell_word, paths)))


def shell_word(path: str | Path) -> str:
    """Return a path, absolute or relative, or another name as one word of a shell."""
    word = min(str(path), os.path.relpath(path), key=len)
    if word.startswith(("-", "~")):  # neither an option nor a home folder
        word = f"./{word}"
    if word == printable(word):
        return shlex.quote(word)
    # bash and zsh read these escapes; bytes that are not text are surrogates.
    letters = []
    for letter in word:
        if "\udc80" <= letter <= "\udcff":
            letters.append(f"\\x{ord(letter) - 0xDC00:02x}")
        else:
            letters.append(f"\\{letter}" if letter in "\\'" else printable(letter))
    return f"$'{''.join(letters)}'"
