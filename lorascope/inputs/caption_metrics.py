"""Metrics of image captions that tables on E2E print: METEOR 1.5, CIDEr and COCO's ROUGE-L, computed by pycocoevalcap.

METEOR and the tokens of all three come from Java programs in that package.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any


def require_java(metric: str) -> None:
    """Raise a FileNotFoundError unless there is a command java."""
    if shutil.which("java") is None:
        raise FileNotFoundError(f"metric {metric!r} requires Java: install a runtime whose command java is on the PATH")


def caption_score(metric: str, predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Compute "meteor", "cider" or "rougeL_coco" of texts with any number of references, as e2e-metrics does."""
    import pycocoevalcap.cider.cider
    import pycocoevalcap.meteor.meteor
    import pycocoevalcap.rouge.rouge

    require_java(metric)
    scorers: dict[str, Any] = {
        "meteor": pycocoevalcap.meteor.meteor.Meteor,
        "cider": pycocoevalcap.cider.cider.Cider,
        "rougeL_coco": pycocoevalcap.rouge.rouge.Rouge,
    }
    texts = _tokenize(tuple(predicted))
    references = iter(_tokenize(tuple(reference for texts in answers for reference in texts)))
    # The scorers take lists of texts by number, in which the text to score is the only one.
    candidates = {number: [text] for number, text in enumerate(texts)}
    targets = {number: [next(references) for _ in texts] for number, texts in enumerate(answers)}
    scorer = scorers[metric]()
    try:
        return float(scorer.compute_score(targets, candidates)[0])
    finally:
        if metric == "meteor":
            # Its destructor ends the process, but leaves these pipes open.
            scorer.meteor_p.stdout.close()
            scorer.meteor_p.stderr.close()


# A run computes several metrics of the same texts, and Java takes seconds to start.
@lru_cache(maxsize=4)
def _tokenize(texts: tuple[str, ...]) -> list[str]:
    """Return texts in lower case, as tokens of the Penn Treebank without punctuation that spaces separate."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    archive = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    # The class of pycocoevalcap writes a file next to itself, which is impossible where only root may install.
    program = "edu.stanford.nlp.process.PTBTokenizer"
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", os.fspath(archive), program, "-preserveLines", "-lowerCase"]
    # The tokenizer breaks lines at other characters than a line feed as well.
    lines = "".join(f"{' '.join(text.split())}\n" for text in texts)
    done = subprocess.run(command, input=lines.encode(), capture_output=True, check=False)
    tokens = done.stdout.decode().split("\n")
    if done.returncode or len(tokens) != len(texts) + 1:
        message = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise OSError(f"cannot tokenize {len(texts)} texts with Java: {' '.join(message) or 'no output'}")
    tokenized = []
    for line in tokens[:-1]:
        words = [word for word in line.split() if word not in ptbtokenizer.PUNCTUATIONS]
        tokenized.append(" ".join(words))
    return tokenized
