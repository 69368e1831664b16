"""An installed package extends the registries, such as those of methods and metrics; see tests/plugin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save

HERE = Path(__file__).parent
SCRIPT = """
import sys
import warnings
from pathlib import Path

with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import lorascope as ls
    from lorascope.experiments import grid

    method = ls.METHODS["scaled"]()
told = [str(each.message) for each in seen if "lorascope" in str(each.message)]
assert len(told) == 1 and "broken" in told[0] and "lorascope_plugin.missing" in told[0], told

adapter = ls.load(sys.argv[1])
assert adapter.files.kind == "Flat"
assert "module_counts" in ls.plots.FIGURES
observers = {"steps": 1, "observe": ["norms", {"name": "largest_entries", "every": 2}]}
settings = grid.read({"task": "sentiment/tweets", "settings": observers, "method": "scaled", "seeds": 1}).settings
assert settings[0]["observe"] == [ls.observe.norms(), ls.observe.OBSERVERS["largest_entries"](every=2)]
assert ls.metrics.get("recall").needs == "two classes"
chart = ls.plots.module_counts(adapter)
assert chart.data["count"].tolist() == [1]

sys.path.insert(0, sys.argv[2])
from tiny import inputs, tiny
import torch
from lorascope.adapters.delta import attached_deltas, fold

model = tiny("bert").eval()
before = model(**inputs(model)).logits
method.attach(model)
assert torch.equal(model(**inputs(model)).logits, before)
for delta in attached_deltas(model).values():
    torch.nn.init.constant_(delta.c, 0.5)
changed = model(**inputs(model)).logits
fold(model)
assert torch.allclose(model(**inputs(model)).logits, changed, atol=1e-5)
assert not torch.allclose(changed, before, atol=1e-5)
print("done")
"""


def test_package_with_entry_points_extends_the_registries(tmp_path: Path) -> None:
    factors = {"h.0.q.down": np.ones((2, 3), np.float32), "h.0.q.up": np.ones((4, 2), np.float32)}
    (tmp_path / "flat.safetensors").write_bytes(save(factors))
    path = os.pathsep.join(filter(None, [str(HERE / "plugin"), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(HERE)]
    found = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert found.stdout == "done\n", found.stderr
