"""``lorascope verify``: everything that follows from the kept evidence, computed again and compared."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from json import dumps
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from lorascope.cli.arguments import command
from lorascope.evidence import blocks, figures, numbers, pages, registration, store, verification
from lorascope.evidence.code_hash import code_hash
from lorascope.evidence.statistics import PAIRS, module_of
from lorascope.files.printable import count_phrase, printable


@command
def main(
    evidence: Annotated[Positional[str | None], arg(metavar="[EVIDENCE]")] = None,
    *,
    write: bool = False,
    retrain: Annotated[int, arg(metavar="N")] = 0,
    json: bool = False,
) -> int:
    """Compute everything again that follows from the kept runs, and compare it with what is kept.

    In a clone of the repository, this includes the README and the docs, whose tables of verdicts are written from the
    runs. Without --retrain it needs neither torch nor training. The exit code is 1 if anything differs.

    Example: lorascope verify data/evidence

    Parameters
    ----------
    evidence
        Folder of evidence; if omitted, data/evidence of the repository or of the installed package.
    write
        Write what follows from the kept runs: tables of the evidence, and blocks of README and docs.
    retrain
        Train N random judged runs again and compare them with the kept ones, 2 to 5 minutes each; this needs torch.
    json
        Print the differences as JSON.
    """
    registered = registration.FILE
    if not registered.exists():
        raise FileNotFoundError(f"no registration at {printable(registered)}: install lorascope again")
    clone, own = registration.clone_of(registered), registered.parent / "evidence"
    folder = Path(evidence) if evidence else own
    kept = (folder / "runs.csv").exists()
    if retrain < 0:
        raise ValueError(f"--retrain must be >= 0, got {retrain}")
    if (evidence or retrain) and not kept:
        raise FileNotFoundError(f"no evidence at {printable(folder)}: it has no runs.csv")
    # Pages state the evidence of the repository, not that of another folder.
    root = clone if folder.resolve() == own.resolve() else None
    if write and clone is None:
        raise ValueError("--write requires a clone of the repository, got an installed package")
    if write and root is None:
        raise ValueError(f"--write requires the evidence of the repository, {printable(own)}")
    claims = registration.read(registered)
    found = store.read_kept(folder)
    derived = verification.derive(found, claims, PAIRS)
    measured = numbers.measured_numbers(blocks.Tables(claims, registered.parent, found, derived))
    derived = derived.with_file(numbers.FILE, measured)
    if write and kept:
        verification.rewrite_derived(folder, derived, registered)
    differences: list[str] = []
    if root:
        texts = blocks.all_blocks(claims, registered.parent, found, derived)
        for page in (root / "README.md", *sorted((root / "docs").glob("*.md")), *sorted(root.glob("docs/papers/*.md"))):
            if write:
                pages.write(page, texts)
            differences += [*pages.differences(page, texts), *numbers.repeated(page, measured)]
    if kept:
        differences += verification.verify(
            folder,
            registered,
            claims,
            PAIRS,
            lambda id: code_hash(module_of(id), id),
            found,
            derived,
            root / figures.FOLDER if root else None,
        )
    if retrain:
        # Before torch is imported, so that machines with other instructions compute the same numbers.
        os.environ |= store.INSTRUCTIONS
        from lorascope.probes import evidence as training

        with redirect_stdout(sys.stderr):  # its progress must not mix with JSON
            differences += training.retrain(folder, retrain, registered)
    if json:
        print(dumps({"differences": differences}))
    else:
        for line in differences:
            print(line, file=sys.stderr)
        judged = len(claims.of_tier("primary", "secondary"))
        agrees = f"{count_phrase(len(differences), 'difference')}." if differences else "All agrees."
        runs = f"Kept: {count_phrase(len(found.runs), 'run')}" if kept else "No runs are kept yet"
        print(f"{agrees} {runs} for {count_phrase(judged, 'claim')}.")
    return 1 if differences else 0
