"""Screens of 80 columns: the frame of every report with its strip of layers, and the screens of one adapter or run."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console, RenderableType
from rich.text import Text

from lorascope.diagnosis.case import largest_rows
from lorascope.diagnosis.causes.finding import Finding
from lorascope.diagnosis.inspection import Facts, Inspection, InspectionReport
from lorascope.diagnosis.null import below_null, outliers
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.printable import printable
from lorascope.files.text_layout import (
    LABEL_WIDTH,
    WIDTH,
    Block,
    Elided,
    TableColumn,
    aligned_table,
    block_grid,
    elide,
    format_norm,
    format_number,
    format_percent,
    format_span,
    format_whole_number,
    render_text,
    wrap_paragraph,
)
from lorascope.runs.adapter import Adapter
from lorascope.runs.module_summary import Row, column, pool_norms

Modules = list[Row]
_ROUNDED_RANK = 1e-6
_STRIP_WIDTH = 32  # what a label and four numbers leave of 80 columns
_STACKS = {"": "", "encoder": "enc ", "decoder": "dec "}
# Characters for zero and for values, smallest first.
DIGITS, BLOCKS = ".123456789", "·▁▂▃▄▅▆▇█"
_FAULTS = {"nan-norms", "no-update", "zero-updates", "unmatched"}
"""Causes of findings that ``lorascope doctor`` explains."""
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
    screen = render_text(target, block_grid(header), "", *body, "", block_grid(end))
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


class Strip(NamedTuple):
    """Strip of an inspection screen: a quantity to show along the layers.

    Parameters
    ----------
    title : str
    pool : callable
        Value of the modules of one stack, role and column.
    caption : str
        Description of the largest value, with ``{}`` for the value.
    form : callable
        Format of a value.
    pooled : str
        Remark about columns of several layers.
    """

    title: str
    pool: Callable[[Modules], float]
    caption: str
    form: Callable[[float], str] = format_norm
    pooled: str = ""


def layer_strip(
    report: InspectionReport, target: Console, strip: Strip, columns: Sequence[TableColumn]
) -> Iterator[RenderableType]:
    """Yield the strips of an inspection screen: a table of layers and numbers with one row per role, and its scale."""
    # A file or a pipe may be read by programs that expect ASCII.
    scale = BLOCKS if target.is_terminal and not target.options.ascii_only else DIGITS
    modules = [module for module in report.module_rows() if module["layer"] is not None]
    depth = 1 + max(column(modules, "layer"), default=-1)
    # A deep model has several layers per column, and up to ten layers have three columns each.
    step = max(1, math.ceil(depth / _STRIP_WIDTH))
    repeat = max(1, _STRIP_WIDTH // max(depth, 10))
    cells: dict[tuple[str, str, int], Modules] = {}
    for module in modules:
        cells.setdefault((module["stack"], module["role"], module["layer"] // step), []).append(module)
    values = {key: strip.pool(cell) for key, cell in cells.items()}
    top = max(filter(math.isfinite, values.values()), default=0.0)
    has_stacks = len(set(column(modules, "stack"))) > 1
    rows = []
    for row in report.role_rows():
        stack, role = row["stack"], row["role"]
        glyphs, name = "", role
        for index in range(math.ceil(depth / step)):
            glyphs += _glyph(values.get((stack, role, index)), top, scale) * repeat
        if has_stacks:
            name = _STACKS.get(stack, f"{stack} ") + role
        rows.append(row | {"name": name, "strip": glyphs})
    names = TableColumn(strip.title, LABEL_WIDTH - 1, "name")
    strips = TableColumn(_layer_axis(depth, step, repeat), _STRIP_WIDTH, "strip")
    yield aligned_table([names, strips, *columns], rows)
    if top:
        legend = f"{scale[-1]} is {strip.caption.format(strip.form(top))}, {scale[0]} is zero"
        if step > 1:
            legend += f", {step} layers per column{strip.pooled}"
        yield block_grid([Block("", [legend])])


def _glyph(value: float | None, largest: float, scale: str) -> str:
    """Return one character for a value: blank for None (nothing is adapted), and ! for NaN and infinity."""
    if value is None:
        return " "
    if not math.isfinite(value):
        return "!"
    if value == 0:
        return scale[0]
    steps = len(scale) - 1
    # The largest value would be one step above the scale.
    return scale[min(steps, 1 + int(steps * (value / largest)))]


def _layer_axis(depth: int, step: int, repeat: int) -> str:
    """Return the layer numbers above their columns, with the last one if there is room."""
    bins = math.ceil(depth / step)
    line = ""
    # A layer number needs up to three columns and a gap.
    for index in range(0, bins, {1: 8, 2: 2, 3: 1}[repeat]):
        line = line.ljust(index * repeat) + str(index * step)
    last = str(depth - 1)
    start = min((bins - 1) * repeat, _STRIP_WIDTH - len(last))
    if start > len(line):
        line = line.ljust(start) + last
    return line


def inspection_screen(inspection: Inspection, target: Console, null: pd.DataFrame | None = None) -> str:
    """Format the inspection screen of one adapter or run, with the table of ``null_table`` if there is one."""
    columns = [
        *_size_columns(inspection),
        TableColumn("rank", 6, "least_rank", format_span, "most_rank"),
        TableColumn("effective", 9, "effective_rank", format_number),
    ]
    strip = Strip("|dW| by layer", _pool_layers, "{} per layer", pooled=" (RMS)")
    lines = []
    for module in largest_rows(inspection.measured, "update_norm", 3):
        rank = ""
        if not math.isnan(module.effective_rank):
            rank += f"  rank {format_number(module.effective_rank)}"
            # The update of DoRA with W_0 has a higher rank than its direction, which is the rank of the module.
            if module.rank is not None and module.effective_rank <= module.rank + _ROUNDED_RANK:
                rank += f" of {module.rank}"
        lines.append(Elided(module.module, f"{format_norm(module.update_norm):<6} ", rank))
    blocks = [Block("largest |dW|", lines)]
    if null is not None:
        blocks += _null_blocks(null)
    body = layer_strip(inspection, target, strip, columns)
    header = header_blocks(inspection.facts)
    return report_screen(
        target, header, *body, blocks=blocks, findings=inspection.details, command=_next_command(inspection)
    )


def _next_command(inspection: Inspection) -> str:
    """Return the command that shows more about the findings of an inspection, for pasting into a shell."""
    causes, run = {finding.cause for finding in inspection.details}, inspection.run
    folders = [inspection.path or Path()]
    if causes & _FAULTS:
        return shell_command("lorascope doctor {}", folders)
    if isinstance(run, Adapter) and run.base is not None:
        if "intruders-unknown" in causes:
            return shell_command("lorascope inspect {} --spectra", [*folders, run.base.folder])
        if run.files.needs_base:
            folders.append(run.base.folder)
    figure = "update_norm" if run.incomplete_updates() and not run.spectra else "spectrum"
    return shell_command(f"lorascope plot {figure} {{}} -o {figure}.pdf", folders)


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
    return command.format(" --base ".join(map(_shell_word, paths)))


def _shell_word(path: str | Path) -> str:
    """Return a path, absolute or relative, as one word of a shell."""
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
