"""``lorascope price``: what smaller ranks would cost, and whether the rank of a run is too small."""

from __future__ import annotations

from json import dumps
from typing import Annotated

from tyro.conf import arg

from lorascope.cli.arguments import Name, command
from lorascope.cli.opened_runs import open_runs
from lorascope.files.printable import printable
from lorascope.files.typed_json import json_values
from lorascope.insight.price import RANKS, price


@command
def main(
    path: Annotated[str | None, arg(metavar="RUN")] = None,
    /,
    *,
    model: Name = None,
    task: Name = None,
    ranks: Annotated[str, arg(metavar="K,K")] = ",".join(map(str, RANKS)),
    rows: Annotated[int, arg(metavar="N")] = 1280,
    retrain: Annotated[int, arg(metavar="N")] = 0,
    json: bool = False,
) -> int:
    """Measure the cost of smaller ranks for a run or an adapter, and whether its rank is too small.

    Cuts are exact. What training at another rank costs is only known after --retrain, whose cost is printed first.

    Example: lorascope price runs/lora --model minilm --task sentiment/movies

    Parameters
    ----------
    path
        Run or adapter: a folder, a .safetensors file, or a name on the Hugging Face Hub (user/adapter).
    model
        Base model: minilm, smollm2, a folder, a GGUF file or a Hub id.
    task
        Task on whose validation rows losses are measured: sentiment, a file or a Hugging Face dataset.
    ranks
        Ranks to cut to and to train at, separated by commas.
    rows
        Maximum number of rows.
    retrain
        Number of seeds with which to train at each rank, at the same and at three times the learning rate.
    json
        Print JSON.
    """
    example = "lorascope price runs/lora --model minilm --task sentiment/movies"
    for name, value in (("RUN", path), ("--model", model), ("--task", task)):
        if value is None:
            raise ValueError(f"{name} is required: {example}")
    assert path is not None
    assert model is not None
    assert task is not None
    result = price(open_runs([path], None)[0], model, task, _parse_ranks(ranks), rows, retrain)
    if json:
        print(dumps(json_values(result.to_json()), indent=1))
    else:
        for line in repr(result).splitlines():
            print(printable(line))
    return 0


def _parse_ranks(text: str) -> list[int]:
    try:
        return list(map(int, text.split(",")))
    except ValueError:
        raise ValueError(
            f"--ranks must be integers separated by commas, such as 1,2,4, got {printable(text)}"
        ) from None
