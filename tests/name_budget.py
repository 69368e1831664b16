"""Count filler names, homonyms, dense expressions and comments, and compare the numbers with a budget.

    python tests/name_budget.py            exit 1 if a number of the package is worse than in name_budget.json
    python tests/name_budget.py --list     also print the places
    python tests/name_budget.py --write    store the present numbers as the budget: it may fall, not rise

A filler word says nothing about the value that it names: ``found``, ``each``, ``own``. All bindings are counted:
targets of assignments and loops, arguments, functions, classes and files. A filler with a noun, such as
``kept_runs``, is none. ``# names: ok`` on a line allows an exception.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1] / "lorascope"
BUDGET = Path(__file__).with_suffix(".json")
# Word -> what to write instead. "ITEM" stands for the noun of what is iterated over, found or returned.
FILLERS = {
    "found": "the noun of the result: rows, match, reader, verdicts",
    "each": "the singular of what is iterated over: for run in runs",
    "own": "whose and what: own_keys -> arm_labels, local_modules",
    "kept": "kept_ITEM, saved_ITEM, or the noun alone",
    "known": "the noun: names, registered, supported",
    "given": "the noun: fields, arguments, overrides",
    "named": "the noun: by_name, names, modules",
    "mine": "actual, expected, of which object",
    "theirs": "other_value, reference",
    "again": "recomputed, retrained",
    "shown": "text, label, displayed_ITEM",
    "told": "message, summary, label",
    "seen": "visited, recorded, names",
    "one": "left, a, the noun",
    "two": "right, b, the noun",
    "both": "pair, merged",
    "others": "other_ITEM",
    "rest": "remaining_ITEM, arguments",
    "wanted": "requested_ITEM, expected_ITEM, targets",
    "needed": "required_ITEM, requirements",
    "lacking": "missing_ITEM, missing",
    "least": "minimum, min_ITEM",
    "most": "maximum, max_ITEM",
    "more": "extra_ITEM",
    "less": "smaller",
    "place": "position, index, path, axis",
    "places": "positions, indices, paths",
    "held": "stored_ITEM, locked",
    "whole": "full_ITEM, total",
    "part": "module, component, section, piece of what",
    "parts": "modules, components, sections",
    "what": "the noun: subject, quantity, description",
    "whose": "owner",
    "how": "mode, method",
    "why": "reason",
    "at": "position, step, path, index",
    "by": "key, by_ITEM",
    "chosen": "selection, selected_ITEM",
    "taken": "used_ITEM, reserved",
    "drawn": "sample, drawn_ITEM",
    "made": "created_ITEM, the noun",
    "gone": "removed_ITEM",
    "listed": "the noun, lines, text",
    "counted": "count, counts",
    "thing": "the noun",
    "things": "the noun",
    "stuff": "the noun",
    "several": "multiple_ITEM, is_multiple",
    "apart": "separate_ITEM, distance",
    "alike": "equal, similar_ITEM",
    "alone": "single_ITEM, isolated",
    "until": "end_step, stop",
    "since": "start_step",
    "here": "this_ITEM, package, row",
    "there": "target",
}
PROTOCOL = {
    "main", "read", "write", "draw", "load", "forward", "update", "fit", "init", "apply", "lines", "arms", "figures",
    "measure", "subspace_similarity", "add_run", "study_arms", "dial", "price",
}  # fmt: skip
"""Public functions that several modules define on purpose: a command, a reader, a backend, an optimizer, a meter.

``subspace_similarity`` is the paper's name of a quantity and of its figure, and ``dial`` and ``price``
measure and draw; each edition of the evidence has an ``add_run``.
"""
TERMS = {"part", "parts", "whole", "by"}
"""Terms of the dial, in the files that use them: the parts of an update, the whole, and what divides it."""
DIAL_FILES = {
    "advice_rules", "advise", "dial", "instrument_costs", "part_verdicts", "update_parts", "learning_and_forgetting",
    "scaled_parts",
}  # fmt: skip
DENSE = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
MOST_SHARED = 3
"""Files of a package with the same name: the floors of one concept, such as analysis, observe and plots."""
GENERIC = {"base", "utils", "util", "helpers", "common", "misc", "core", "tools"}
"""Names of files that say nothing."""


class Hit(NamedTuple):
    """A place: file, line, rule, name and suggestion."""

    path: str
    line: int
    rule: str
    name: str
    use: str


class Report(NamedTuple):
    """Numbers of a project, and their places."""

    numbers: dict[str, float]
    hits: list[Hit]


def bindings(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every name that a file binds, with its line; ``other`` of a special method is not counted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno
            arguments = node.args
            names = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            for argument in filter(None, names):
                if argument.arg not in ("self", "cls"):
                    yield argument.arg, argument.lineno
        elif isinstance(node, ast.Lambda):
            for argument in node.args.args:
                yield argument.arg, argument.lineno
        elif isinstance(node, ast.ClassDef | ast.MatchAs | ast.MatchStar | ast.ExceptHandler) and node.name:
            yield node.name, node.lineno


def is_filler(name: str, terms: set[str]) -> bool:
    word = name.strip("_").lower()
    return word in FILLERS and word not in terms


def comment_lines(text: str) -> set[int]:
    """Return the lines that have a comment, directives for tools excepted."""
    skipped = ("# type:", "# noqa", "# fmt:", "# names:", "# prose:", "# pragma")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {t.start[0] for t in tokens if t.type == tokenize.COMMENT and not t.string.startswith(skipped)}


def allowed_lines(text: str) -> set[int]:
    return {number for number, line in enumerate(text.splitlines(), 1) if "# names: ok" in line}


def python_files(paths: list[Path]) -> list[Path]:
    files = (file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*.py"))))
    return list(files)


def inspect(files: list[Path]) -> Report:
    """Count everything in these files."""
    hits: list[Hit] = []
    classes, functions, stems = defaultdict(list), defaultdict(list), defaultdict(list)
    total: Counter[str] = Counter()
    for file in files:
        text, path = file.read_text(encoding="utf-8"), str(file)
        tree = ast.parse(text)
        allowed, lines = allowed_lines(text), text.count("\n") + 1
        names = [*bindings(tree), (file.stem, 1)]
        terms = TERMS if file.stem in DIAL_FILES else set()
        fillers = [(name, line) for name, line in names if is_filler(name, terms) and line not in allowed]
        hits += [Hit(path, line, "filler", name, FILLERS[name.strip("_").lower()]) for name, line in fillers]
        dense = sum(isinstance(node, DENSE) for node in ast.walk(tree))
        ternaries = sum(isinstance(node, ast.IfExp) for node in ast.walk(tree))
        for node in ast.walk(tree):
            if isinstance(node, DENSE) and node.lineno not in allowed and is_crowded(node):
                hits.append(
                    Hit(path, node.lineno, "crowded", type(node).__name__, "name a step of it, or write a loop")
                )
        total.update(
            lines=lines, bindings=len(names), fillers=len(fillers), comprehensions=dense, ternaries=ternaries,
            comments=len(comment_lines(text)),
        )  # fmt: skip
        for node in tree.body:
            public = not getattr(node, "name", "_").startswith("_")
            if isinstance(node, ast.ClassDef) and public:
                classes[node.name].append((path, node.lineno))
            elif isinstance(node, ast.FunctionDef) and public and node.name not in PROTOCOL:
                functions[node.name].append((path, node.lineno))
        if file.stem not in ("__init__", "__main__", "conftest"):
            stems[file.stem].append((path, 1))
    for rule, table, most in (("class", classes, 1), ("function", functions, 1), ("file", stems, MOST_SHARED)):
        for name, found in table.items():
            if len(found) > most or (rule == "file" and name in GENERIC):
                use = f"also in {', '.join(path for path, _ in found[1:4])}" if found[1:] else "say what is in it"
                hits.append(Hit(*found[0], rule, name, use))
    kilolines = max(total["lines"], 1) / 1000
    numbers = {
        "lines": total["lines"],
        "fillers_percent": round(100 * total["fillers"] / max(total["bindings"], 1), 2),
        "homonymous_classes": sum(hit.rule == "class" for hit in hits),
        "homonymous_functions": sum(hit.rule == "function" for hit in hits),
        "shared_or_generic_files": sum(hit.rule == "file" for hit in hits),
        "comprehensions_per_1000": round(total["comprehensions"] / kilolines, 1),
        "ternaries_per_1000": round(total["ternaries"] / kilolines, 1),
        "crowded": sum(hit.rule == "crowded" for hit in hits),
        "comments_percent": round(100 * total["comments"] / max(total["lines"], 1), 2),
    }
    return Report(numbers, hits)


def is_crowded(node: ast.AST) -> bool:
    """Return whether a comprehension has two of: a second loop, a condition, an inner comprehension, a ternary."""
    generators = getattr(node, "generators", [])
    conditions = any(generator.ifs for generator in generators)
    nested = sum(isinstance(inner, DENSE) for inner in ast.walk(node)) > 1
    ternary = any(isinstance(inner, ast.IfExp) for inner in ast.walk(node))
    return (len(generators) > 1) + conditions + nested + ternary >= 2


def worse(numbers: dict[str, float], budget: dict[str, float]) -> list[str]:
    """Return one line for each number that is worse than its budget; more comments are better."""
    lines = []
    for key, limit in budget.items():
        if key == "lines":
            continue
        value = numbers[key]
        if value < limit if key == "comments_percent" else value > limit:
            lines.append(f"{key}: {value:g}, the budget is {limit:g}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("paths", nargs="*", type=Path, default=[PACKAGE])
    parser.add_argument("--list", action="store_true", help="print the places")
    parser.add_argument("--write", action="store_true", help="store the present numbers as the budget")
    options = parser.parse_args()
    numbers, hits = inspect(python_files(options.paths))
    if options.list:
        for hit in hits:
            print(f"{hit.path}:{hit.line}: {hit.rule} {hit.name}: {hit.use}")
    if options.write:
        BUDGET.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    exceeded = worse(numbers, json.loads(BUDGET.read_text(encoding="utf-8")))
    print(", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in numbers.items()))
    print("\n".join(exceeded), file=sys.stderr, end="\n" if exceeded else "")
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
