"""Hash of the code of a claim: what changes it, and what does not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lorascope.papers.judging import code_hash
from lorascope.papers.judging.code_hash import comparison_hash

PROBE = '''"""A probe."""
from planted_code import helpers
from planted_code.helpers import share as part

LABEL = "LoRA"
OTHER = "full"


def value(table):
    """Return the value."""
    return helpers.scale(table) + part(table)


PROBE = dict(claims={"p.first": (OfRun(value, LABEL), 1.0), "p.second": (OfRun(helpers.scale, OTHER), 2.0)})
'''
HELPERS = """FACTOR = 2


def scale(table):
    return FACTOR * table


def share(table: int) -> float:
    # a comment
    return _half(table)


def _half(table):
    result = [entry / 2 for entry in table]
    return result


def unused(table):
    return 0
"""


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: Any) -> Any:
    """Return a function that writes the two modules with a replacement and hashes a claim."""
    folder = tmp_path / "planted_code"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(code_hash, "_PART_OF_COMPARISON", re.compile(r"planted_code(\.\w+)*"))

    def write(old: str = "", new: str = "", claim: str = "p.first") -> str:
        assert old in PROBE + HELPERS
        (folder / "probe.py").write_text(PROBE.replace(old, new) if old else PROBE, encoding="utf-8")
        (folder / "helpers.py").write_text(HELPERS.replace(old, new) if old else HELPERS, encoding="utf-8")
        code_hash._module.cache_clear()
        return comparison_hash("planted_code.probe", claim)

    yield write
    code_hash._module.cache_clear()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(OfRun(value, LABEL), 1.0)", "(OfRun(value, LABEL), 1.1)"),
        ("(OfRun(value, LABEL), 1.0)", "(OfRun(value, OTHER), 1.0)"),
        ('LABEL = "LoRA"', 'LABEL = "AdaLoRA"'),
        ("helpers.scale(table) + part", "helpers.scale(table) - part"),
        ("FACTOR = 2", "FACTOR = 3"),
        ("entry / 2", "entry / 3"),
        ("return _half(table)", "return -_half(table)"),
        ("import share as part", "import unused as part"),
        ("return result", "return table"),
    ],
)
def test_what_computes_the_claim_changes_its_hash(planted: Any, old: str, new: str) -> None:
    assert planted(old, new) != planted()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('OTHER = "full"', 'OTHER = "other"'),
        ("    return 0", "    return 1"),
        (
            "    result = [entry / 2 for entry in table]\n    return result",
            "    halves = [x / 2 for x in table]\n    return halves",
        ),
        ('"""Return the value."""', '"""Return it."""'),
        ("# a comment", "# another comment"),
        ("table: int) -> float", "table) -> Any"),
        ('"p.second": (OfRun(helpers.scale, OTHER), 2.0)', '"p.second": None'),
    ],
)
def test_what_does_not_compute_the_claim_leaves_its_hash(planted: Any, old: str, new: str) -> None:
    assert planted(old, new) == planted()


def test_claims_have_hashes_of_their_own(planted: Any) -> None:
    assert planted(claim="p.second") != planted()
    with pytest.raises(KeyError, match=r"planted_code.probe must have one row for claim 'p.third', got 0"):
        planted(claim="p.third")
