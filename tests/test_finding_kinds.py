"""Kinds of findings: ids are unique and stable, and everything that a diagnosis reports has one."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import lorascope
from lorascope.diagnosis.causes import RULES
from lorascope.diagnosis.kinds import KINDS

DIAGNOSIS = Path(lorascope.__file__).parent / "diagnosis"
REMOVED_IDS: set[str] = set()  # of kinds that a release had: add an id here when its kind is removed


def test_ids_are_numbered_per_group_without_gaps_except_removed_kinds():
    """A removed kind leaves its id in ``REMOVED_IDS``, so that no other kind gets it."""
    assert not REMOVED_IDS & KINDS.keys()
    groups: dict[str, list[int]] = {}
    for id in sorted(KINDS.keys() | REMOVED_IDS):
        assert re.fullmatch(r"LS\d{3}", id)
        groups.setdefault(id[:3], []).append(int(id[3:]))
    assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in groups.values())
    assert KINDS["LS015"].number == 15


def test_every_finding_has_a_kind_that_is_stated_once():
    """Only the contract of the rules creates a ``Finding``, and every id is the argument of one kind."""
    kinds_of_rules = {rule.id for rule in RULES if rule.find.__module__.startswith("lorascope.")}
    assert kinds_of_rules <= KINDS.keys()
    stated: Counter[str] = Counter()
    for file in DIAGNOSIS.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding":
                assert file == DIAGNOSIS / "causes/finding.py"
            if isinstance(node, ast.Constant) and re.fullmatch(r"LS\d{3}", str(node.value)):
                stated[node.value] += 1
    assert stated == Counter(KINDS.keys())


def test_every_kind_has_all_texts():
    for kind in KINDS.values():
        assert kind.problem.endswith("."), kind.id
        assert kind.evidence, kind.id
        assert (kind.fix == "") == (kind.id[2] in "14"), kind.id  # observations have no fix
