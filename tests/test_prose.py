"""Plain English: words that the project replaces by plainer ones, in docstrings, messages, comments and pages."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_readme import PAGES, hand_written

ROOT = Path(__file__).parents[1]
PLAINER = {
    r"anew": "again",
    r"whatever": "regardless of, any",
    r"by lot": "at random",
    r"but for": "except for",
    r"in place of": "instead of",
    r"thin products?": "low-rank factors",
    r"owed to": "due to",
    r"yardsticks?": "baseline",
    r"set beside": "compared with",
    r"for want of": "because ... is missing",
    r"mend(?:s|ed)?": "fix",
    r"turned neurons?": "rotated neurons",
    r"an A each": "separate A's",
    r"is no (?:rank|rate|share|method)": "NAME must be ..., got ...",
    r"data sets?": "dataset",
    r"(?:colour|behaviour|neighbour|licence|artefact)s?": "US spelling",
    r"(?:initiali|normali|standardi|recogni|summari)s(?:e[ds]?|ing|ation)": "US spelling",
}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line numbers and texts that people read: strings and comments of code, prose of pages."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                if lines[node.lineno - 1].endswith("# prose: ok"):  # a label that stored runs have
                    continue
                yield node.lineno, node.value
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string
    elif path.suffix == ".ipynb":
        for number, cell in enumerate(json.loads(source)["cells"]):
            if cell["cell_type"] == "markdown":
                yield number, re.sub(r"`[^`\n]*`", "``", "".join(cell["source"]))
    else:
        yield from enumerate(re.sub(r"`[^`\n]*`", "``", source).splitlines(), start=1)


def awkward_words(text: str) -> list[str]:
    return [
        f"{found[0]!r}: {better}"
        for pattern, better in PLAINER.items()
        for found in re.finditer(rf"(?<![\w`]){pattern}(?![\w`])", text, re.IGNORECASE)
    ]


@pytest.mark.parametrize("text", ["drawn anew", "by lot", "it was mended", "8 is no rank", "initialised", "colours"])
def test_awkward_words_are_found(text: str) -> None:
    assert awkward_words(text)


@pytest.mark.parametrize("text", ["resampled", "a lot of", "recommended", "the rank", "initialized", "`initialise`"])
def test_plain_words_pass(text: str) -> None:
    assert not awkward_words(text)


def test_the_project_is_written_in_plain_words() -> None:
    code = (
        path for folder in ("lorascope", "benchmarks", "figures", "docs/_ext") for path in (ROOT / folder).rglob("*.py")
    )
    pages = [*filter(hand_written, PAGES), ROOT / "CHANGELOG.md", ROOT / "data" / "README.md"]
    files = [*code, *pages, *(ROOT / "notebooks").glob("*.ipynb")]
    assert len(files) > 250
    found = [
        f"{path.relative_to(ROOT)}:{line}: {words}"
        for path in files
        for line, text in texts(path)
        for words in awkward_words(text)
    ]
    assert not found, "\n".join(found)
