"""Quiz of the layout: can a reader tell in which file a definition is, from the first line of its docstring?

``python tests/layout_quiz.py`` draws a sample of definitions, and prints the names of all files, the lines and the
seed. Write one path per line into a file, such as ``analysis/norms.py``, and score it with ``--seed`` and
``--guesses``.
"""

from __future__ import annotations

import argparse
import ast
import random
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lorascope"
NUMBER = 60


def public_definitions() -> Iterator[tuple[str, str]]:
    """Yield file and first docstring line of every public function and class at the top of a file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if doc := ast.get_docstring(node):
                yield path.relative_to(PACKAGE).as_posix(), doc.partition("\n")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="seed of a sample that was printed")
    parser.add_argument("--guesses", type=Path, metavar="FILE", help="one path per line, in the order of the sample")
    options = parser.parse_args()
    sample = random.Random(options.seed).sample(list(public_definitions()), NUMBER)
    if options.guesses is None:
        print("\n".join(path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.rglob("*.py"))))
        for number, (_, line) in enumerate(sample, start=1):
            print(f"{number:2} {line}")
        print(f"seed {options.seed}")
        return
    guesses = options.guesses.read_text(encoding="utf-8").split()
    right = 0
    for number, ((path, line), guess) in enumerate(zip(sample, guesses, strict=True), start=1):
        right += path == guess
        if path != guess:
            print(f"{number:2} {line}\n   in {path}, guessed {guess}")
    print(f"{right} of {NUMBER} right")


if __name__ == "__main__":
    main()
