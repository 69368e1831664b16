"""Kinds of findings: ids are unique and stable, and everything that a diagnosis reports has one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import lorascope
from lorascope.diagnosis.causes import RULES
from lorascope.diagnosis.kinds import KINDS

COMMITTED = Path(__file__).with_name("finding_ids.txt")
DIAGNOSIS = Path(lorascope.__file__).parent / "diagnosis"


def own_rules():
    return [rule for rule in RULES if rule.find.__module__.startswith("lorascope.")]


def test_ids_are_the_committed_ones():
    """A line of the file is never changed or removed, so that an id of a removed kind is not used again."""
    committed = [line.split() for line in COMMITTED.read_text(encoding="utf-8").splitlines()]
    assert len({id for id, _ in committed}) == len(committed)
    assert {id: kind.name for id, kind in KINDS.items()}.items() <= {id: name for id, name in committed}.items()
    assert [id for id, _ in committed] == sorted(id for id, _ in committed)


def test_ids_have_three_digits_and_their_number():
    assert all(re.fullmatch(r"LS\d{3}", id) and kind.id == id for id, kind in KINDS.items())
    assert KINDS["LS015"].number == 15


def test_every_rule_has_one_id():
    ids = [rule.id for rule in own_rules()]
    assert len(set(ids)) == len(ids)
    assert set(ids) <= KINDS.keys()
    assert all((rule.name, rule.fix, rule.needs) == _texts(KINDS[rule.id]) for rule in own_rules())


def _texts(kind):
    return kind.name, kind.fix, kind.needs


def test_findings_are_created_only_with_a_kind():
    """Outside the contract of the rules, only ``of_kind`` creates a finding, and every kind is used."""
    used = {rule.id for rule in own_rules()}
    for file in DIAGNOSIS.rglob("*.py"):
        if file.name == "kinds.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding":
                assert file == DIAGNOSIS / "causes/finding.py"
            if isinstance(node, ast.Constant) and re.fullmatch(r"LS\d{3}", str(node.value)):
                used.add(node.value)
    assert used == KINDS.keys()


def test_every_kind_has_all_texts():
    for kind in KINDS.values():
        assert kind.problem.endswith("."), kind.id
        assert kind.evidence, kind.id
        assert (kind.fix == "") == (kind.id[2] in "14"), kind.id  # observations have no fix
