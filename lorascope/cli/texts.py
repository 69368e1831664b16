"""``lorascope texts``: generated texts and their references as files for other scorers."""

from __future__ import annotations

from json import dumps
from typing import Annotated

from tyro.conf import arg

from lorascope.cli.arguments import command, reject
from lorascope.export.text_files import PROMPTS, REFERENCES, TEXTS, to_texts
from lorascope.files.printable import count_phrase, printable
from lorascope.runs.loading import load
from lorascope.runs.run import Run


@command
def main(
    run: Annotated[str | None, arg(metavar="RUN")] = None,
    /,
    *,
    out: Annotated[str | None, arg(aliases=["-o"], metavar="DIR")] = None,
    json: bool = False,
) -> int:
    """Write the texts that a run generated, their prompts and their references, for scorers such as e2e-metrics.

    Each file has one line per text. The references of two prompts are separated by an empty line.

    Example: lorascope texts runs/lora -o scored

    Parameters
    ----------
    run
        Run that was trained with --generation.
    out
        New folder for prompts.txt, texts.txt and references.txt.
    json
        Print JSON.
    """
    reject(
        {
            "RUN is required: lorascope texts runs/lora -o scored": run is None,
            "-o DIR is required: lorascope texts runs/lora -o scored": out is None,
        }
    )
    opened = load(str(run))
    if not isinstance(opened, Run):
        raise ValueError(f"RUN must be a run of ls.train, got {printable(run)}, which has no generated texts")
    folder = to_texts(opened, str(out))
    count = len(opened.texts)
    references = sum(map(len, opened.texts["references"]))
    if json:
        print(dumps({"path": str(folder), "texts": count, "references": references}))
    else:
        sizes = f"{count_phrase(count, 'text')} and {count_phrase(references, 'reference')}"
        print(f"{printable(folder)}: {sizes} in {PROMPTS}, {TEXTS} and {REFERENCES}")
    return 0
