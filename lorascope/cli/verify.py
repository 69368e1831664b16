"""``lorascope verify``: everything that follows from the kept evidence, computed again and compared."""

from __future__ import annotations

import sys
from json import dumps
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from lorascope.cli.arguments import command
from lorascope.evidence import blocks, pages, registration, verification
from lorascope.evidence.code_hash import code_hash
from lorascope.evidence.statistics import PAIRS, module_of
from lorascope.files.printable import printable


@command
def main(
    evidence: Annotated[Positional[str | None], arg(metavar="[EVIDENCE]")] = None,
    *,
    write: bool = False,
    json: bool = False,
) -> int:
    """Compute everything again that follows from the kept runs, and compare it with what is kept.

    Needs neither torch nor training. The exit code is 1 if anything differs.

    Example: lorascope verify data/evidence

    Parameters
    ----------
    evidence
        Folder of evidence; if omitted, data/evidence of the repository.
    write
        Write the blocks of README and docs that come from the evidence.
    json
        Print the differences as JSON.
    """
    registered = registration.FILE
    if not registered.exists():
        raise FileNotFoundError(f"no registration at {printable(registered)}: run this in a clone of the repository")
    root = registered.parents[1]
    folder = Path(evidence) if evidence else root / "data" / "evidence"
    claims = registration.read(registered)
    texts = blocks.all_blocks(claims, root / "data")
    documents = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    if write:
        for page in documents:
            pages.write(page, texts)
    differences = [line for page in documents for line in pages.differences(page, texts)]
    kept = (folder / "runs.csv").exists()
    if evidence and not kept:
        raise FileNotFoundError(f"no evidence at {printable(folder)}: it has no runs.csv")
    if kept:
        differences += verification.verify(folder, registered, claims, PAIRS, lambda id: code_hash(module_of(id), id))
    if json:
        print(dumps({"differences": differences}))
    else:
        for line in differences:
            print(line, file=sys.stderr)
        judged = len(claims.of_tier("primary", "secondary"))
        state = "" if kept else f" No runs are kept yet for the {judged} registered claims."
        print((f"{len(differences)} differences." if differences else "All agrees.") + state)
    return 1 if differences else 0
