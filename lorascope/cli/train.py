"""``lorascope train``: one run with one method."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from json import dumps
from typing import Annotated, Any, Literal

from tyro.conf import arg

from lorascope.cli.arguments import call, headline, options_of
from lorascope.experiments.grid import load_task
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
    name, *words = argv
    if name not in METHODS:
        raise ValueError(unknown_name("method", name, METHODS))
    method = METHODS[name]
    # The learning rates of a method are settings of ``train``; betas and eps of Adapprox are its own.
    fields = options_of(method, skip=("lr", "head_lr"))
    # ``run`` has these arguments, or a flag cannot express them.
    skip = ("model", "data", "method", "observe", "out", "generation", *(field.name for field in fields))
    settings = options_of(train, skip=skip)

    def run(
        *,
        model: Annotated[str, arg(metavar="NAME")] = "minilm",
        task: Annotated[str, arg(metavar="NAME")] = "sentiment",
        splits: Literal["given", "hash"] | None = None,
        generation: Annotated[tuple[str, ...], arg(metavar="NAME=VALUE ...")] = (),
        out: Annotated[str | None, arg(aliases=["-o"], metavar="DIR")] = None,
        json: bool = False,
        **options: Any,
    ) -> int:
        """Train a model with a method.

        Parameters
        ----------
        model
            minilm, smollm2, a folder, a GGUF file or a Hub id.
        task
            sentiment, a CSV, JSONL or Parquet file, a folder of images by label, or a Hugging Face dataset.
        splits
            given: splits of the source, or its column split; hash: all rows are shuffled.
        generation
            Generate texts from the prompts of the test split, for metrics such as bleu: fields of ls.Generation, such
            as num_beams=10 max_new_tokens=64.
        out
            Run folder; runs/METHOD-TASK-ID if omitted.
        json
            Print the result as JSON.
        """
        if generation:
            options["generation"] = _parse_generation(generation)
        configured = method(**{field.name: options.pop(field.name) for field in fields})
        data = load_task({"name": task, "splits": splits})
        result = train(model, data, configured, out=out, **options)
        if json:
            values = {"id": result.id, "path": str(result.path), "label": result.label}
            print(dumps(values | {"status": result.meta.status, "test": result.meta.to_json()["test"]}))
        else:
            print(result)
        return 0

    example = f"Example: lorascope train {name} --task sentiment --steps 300 -o runs/{name}"
    command = f"lorascope train {name}"
    return call(run, command, words, [*settings, *fields], f"{headline(method)}\n\n{example}")


def _parse_generation(words: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a Generation from words such as num_beams=10; ``stop=`` may be repeated."""
    values: dict[str, Any] = {}
    for word in words:
        name, separator, text = word.partition("=")
        if not separator:
            raise ValueError(f"--generation requires NAME=VALUE, such as num_beams=10, got {word}")
        if name == "stop":
            values[name] = (*values.get(name, ()), text)
            continue
        if name in values:
            raise ValueError(f"duplicate field of generation {name!r}")
        values[name] = text
        # What is no number is a name, which Generation rejects where it requires a number.
        for kind in (float, int):
            with suppress(ValueError):
                values[name] = kind(text)
    return values
