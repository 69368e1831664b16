"""``lorascope price``: what smaller ranks would cost, and whether the rank of a run is too small."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from lorascope.cli.arguments import File, Name, SavedState, command
from lorascope.cli.opened_runs import open_measured
from lorascope.files.printable import printable
from lorascope.files.typed_json import json_values
from lorascope.files.whole_files import json_bytes, write_bytes


@command
def main(
    run: Annotated[str | None, arg(metavar="RUN")] = None,
    /,
    *,
    model: Name = None,
    task: Name = None,
    ranks: Annotated[str, arg(metavar="K,K,...")] = "1,2,4,8",
    rows: Annotated[int, arg(metavar="N")] = 1280,
    retrain: Annotated[int, arg(metavar="N")] = 0,
    placed: bool = False,
    budgets: Annotated[str, arg(metavar="N,N,...")] = "",
    tolerance: Annotated[float | None, arg(metavar="NATS")] = None,
    state: SavedState = "last",
    out: Annotated[File, arg(aliases=["-o"])] = None,
    json: bool = False,
) -> int:
    """Measure the cost of smaller ranks for a run or an adapter, and whether its rank is too small.

    Cuts are exact. What training at another rank costs is only known after --retrain, whose cost is printed first.

    Example: lorascope price runs/lora --model minilm --task sentiment/movies

    Parameters
    ----------
    run
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
    placed
        With --retrain: also train every smaller rank with its components placed by size.
    budgets
        Numbers of components of all modules to cut to as well, separated by commas.
    tolerance
        Increase of the loss that counts as none (default: a tenth of the decrease by the update).
    state
        Saved parameters.
    out
        Write the result to this new .json file; as price.json in the folder of the run, it is in its report card.
    json
        Print JSON.
    """
    if placed and not retrain:
        raise ValueError("--placed requires --retrain N")
    opened = open_measured("price", run, (model, task), (out,))
    from lorascope.insight.price import price  # imports torch

    numbers: list[int] = []
    if budgets:
        numbers = _parse_integers("budgets", budgets)
    result = price(
        opened,
        str(model),
        str(task),
        _parse_integers("ranks", ranks),
        rows,
        retrain,
        budgets=numbers,
        placed=placed,
        tolerance=tolerance,
        state=state,
    )
    if out is not None:
        write_bytes(Path(out), json_bytes(json_values(result.to_json())))
    if json:
        print(dumps(json_values(result.to_json()), indent=1))
    else:
        for line in repr(result).splitlines():
            print(printable(line))
    return 0


def _parse_integers(option: str, text: str) -> list[int]:
    try:
        return list(map(int, text.split(",")))
    except ValueError:
        raise ValueError(f"--{option} must be integers such as 1,2,4, got {printable(text)!r}") from None
