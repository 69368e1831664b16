"""``lorascope train``: one run with one method."""

from __future__ import annotations

from collections.abc import Sequence
from json import dumps
from typing import Annotated, Any

from tyro.conf import arg

from lorascope.cli.arguments import call, headline, options_of
from lorascope.methods import METHODS
from lorascope.schema.suggestions import unknown_name
from lorascope.training.loop import train

_USAGE = """usage: lorascope train METHOD --steps N [--task TASK] [--model MODEL] [-o RUN] [options]

methods: {methods}

Run lorascope train METHOD --help for the options of a method.

Example: lorascope train lora --task sentiment --model minilm --steps 300 -o runs/lora"""


def main(argv: Sequence[str]) -> int:
    """Train with the method that the first argument names."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE.format(methods=" ".join(METHODS)))
        return 0 if argv else 2
    name, *rest = argv
    if name not in METHODS:
        raise ValueError(unknown_name("method", name, METHODS))
    method = METHODS[name]
    settings = options_of(train, skip=("model", "data", "method", "observe", "out"))
    # The learning rates of a method are settings of ``train``.
    fields = options_of(method, skip=[each.name for each in settings])

    def run(
        *,
        model: Annotated[str, arg(metavar="NAME")] = "minilm",
        task: Annotated[str, arg(metavar="NAME")] = "sentiment",
        out: Annotated[str | None, arg(aliases=["-o"], metavar="DIR")] = None,
        json: bool = False,
        **given: Any,
    ) -> int:
        """Train a model with a method.

        Parameters
        ----------
        model
            minilm, smollm2, a folder, a GGUF file or a Hub id.
        task
            sentiment, a CSV, JSONL or Parquet file, a folder of images by label, or a Hugging Face dataset.
        out
            Run folder; runs/METHOD-TASK-ID if omitted.
        json
            Print the result as JSON.
        """
        chosen = method(**{each.name: given.pop(each.name) for each in fields})
        found = train(model, task, chosen, out=out, **given)
        if json:
            result = {"status": found.meta.status, "test": found.meta.to_json()["test"]}
            print(dumps({"id": found.id, "path": str(found.path), "label": found.label, **result}))
        else:
            print(found)
        return 0

    example = f"Example: lorascope train {name} --task sentiment --steps 300 -o runs/{name}"
    command = f"lorascope train {name}"
    return call(run, command, rest, [*settings, *fields], f"{headline(method)}\n\n{example}")
