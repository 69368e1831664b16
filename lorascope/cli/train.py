"""``lorascope train``: one run with one method."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from tyro.conf import arg

from lorascope.cli.arguments import UsageError, fields_of, headline, parse
from lorascope.methods import METHODS
from lorascope.methods.base import Method
from lorascope.runs.run import Run
from lorascope.schema.deprecation import old_fields
from lorascope.schema.suggestions import unknown_name
from lorascope.training.loop import train

_USAGE = """usage: lorascope train METHOD --steps N [--task TASK] [--model MODEL] [-o RUN] [options]

methods: {methods}

Run lorascope train METHOD --help for the options of a method.

Example: lorascope train lora --task sentiment --model minilm --steps 300 -o runs/lora"""
_GIVEN = ("model", "data", "method", "observe", "out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CommonTrainOptions:
    model: Annotated[str, arg(metavar="NAME", help="minilm, smollm2, a folder, a GGUF file or a Hub id")] = "minilm"
    task: Annotated[
        str,
        arg(
            metavar="NAME",
            help="sentiment, a CSV, JSONL or Parquet file, a folder of images by label, or a Hugging Face dataset",
        ),
    ] = "sentiment"
    out: Annotated[
        str | None, arg(aliases=["-o"], metavar="DIR", help="run folder; runs/METHOD-TASK-ID if omitted")
    ] = None
    json: Annotated[bool, arg(help="print the result as JSON")] = False


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE.format(methods=" ".join(METHODS)))
        return 0 if argv else 2
    name, *rest = argv
    if name not in METHODS:
        raise UsageError(unknown_name("method", name, METHODS))
    method = METHODS[name]
    options: Any = parse(_method_options(name), _rename_old_flags(method, rest), f"lorascope train {name}")
    chosen = method(**{field: getattr(options, field) for field in _field_names(_method_fields(method))})
    settings = {field: getattr(options, field) for field in _field_names(_train_fields())}
    run = train(options.model, options.task, chosen, out=options.out, **settings)
    print(json.dumps(run_to_json(run)) if options.json else run)
    return 0


def _rename_old_flags(method: type[Method], words: Sequence[str]) -> list[str]:
    """Replace deprecated options of a method by their new names, and print one line for each."""
    renamed, found = old_fields(method), []
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        old = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or old not in renamed:
            found.append(word)
            continue
        new, before = renamed[old]
        print(f"lorascope: {flag} is deprecated, use --{new.replace('_', '-')}", file=sys.stderr)
        if before.values:  # the new option is a flag without a value
            chosen = before.to_new(value if equals else next(rest, ""))
            default = next(field.default for field in dataclasses.fields(method) if field.name == new)
            found += [] if chosen == default else [f"--{'' if chosen else 'no-'}{new.replace('_', '-')}"]
        else:
            found.append(f"--{new.replace('_', '-')}{equals}{value}")
    return found


def _method_options(name: str) -> type:
    """Return the options of a method: those of ``train`` and its own fields."""
    method = METHODS[name]
    fields = [*_train_fields(), *_method_fields(method)]
    options = dataclasses.make_dataclass("Options", fields, bases=(_CommonTrainOptions,), frozen=True, kw_only=True)
    options.__doc__ = (
        f"{headline(method)}\n\nExample: lorascope train {name} --task sentiment --steps 300 -o runs/{name}"
    )
    return options


def _train_fields() -> list[Any]:
    return fields_of(train, skip=_GIVEN)


def _method_fields(method: type[Method]) -> list[Any]:
    """Return a method's hyperparameters without its learning rates, which are settings of ``train``."""
    return fields_of(method, skip=_field_names(_train_fields()))


def _field_names(fields: list[Any]) -> list[str]:
    return [name for name, *_ in fields]


def run_to_json(run: Run) -> dict[str, Any]:
    """Convert the result of a run to JSON values."""
    meta = run.meta
    return {
        "id": run.id,
        "path": str(run.path),
        "label": run.label,
        "status": meta.status,
        "test": meta.to_json()["test"],
    }
