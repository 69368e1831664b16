"""Names of the facade, with those of the methods, and methods of other packages through entry points."""

from __future__ import annotations

import subprocess
import sys

import lorascope as ls
from lorascope import methods

METHOD = """
from dataclasses import dataclass

import lorascope as ls


@dataclass(kw_only=True)
class Outside(ls.Method, name="outside"):
    \"\"\"Method of another package.\"\"\"
"""
ENTRIES = """
[lorascope.methods]
outside = outside_method:Outside
broken = outside_missing
"""


def run_python(code: str, path: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", f"import sys\nsys.path.insert(0, {path!r})\n{code}"], **OPTIONS)


OPTIONS = {"capture_output": True, "text": True, "check": True}


def test_facade_has_every_registered_method_of_the_package():
    own = {cls.__name__: cls for cls in methods.METHODS.values() if cls.__module__.startswith("lorascope.")}
    assert {name: getattr(ls, name) for name in ls._METHODS} == own
    assert own.keys() <= set(methods.__all__)
    assert ls.__all__ == dir(ls) == sorted({*ls._PUBLIC, *ls._MODULES, *own})


def test_every_public_name_has_a_docstring():
    documented = {name: getattr(ls, name).__doc__ or "" for name in ls.__all__}
    # A dataclass without a docstring gets its signature.
    assert [name for name, text in documented.items() if not text or text.startswith(f"{name}(")] == []


def test_names_are_known_without_torch(tmp_path):
    code = "import lorascope\nassert 'NeFT' in dir(lorascope)\nassert 'torch' not in sys.modules"
    assert not run_python(code, str(tmp_path)).stderr


def test_entry_points_add_methods_and_a_broken_one_is_named_once(tmp_path):
    (tmp_path / "outside_method.py").write_text(METHOD)
    info = tmp_path / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    known = "from lorascope.methods import METHODS\nassert METHODS['outside'].__name__ == 'Outside'"
    for first in ("", "import outside_method\n"):
        warned = run_python(first + known, str(tmp_path)).stderr
        assert warned.count("Warning") == 1
        assert "'broken' of lorascope.methods: outside_missing" in warned
        assert "No module named 'outside_missing'" in warned
