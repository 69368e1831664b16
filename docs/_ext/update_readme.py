"""Write what the README has from the code: its first figure, and the table of methods."""

from __future__ import annotations

import re

from gallery import run_example
from generated_pages import ROOT, methods_table

from lorascope.charts.save import save_small

README = ROOT / "README.md"
IMAGE = re.compile(r"^!\[[^]]*\]\((.+?)\)", re.MULTILINE)
CODE = re.compile(r"^```python\n(.*?)\n```", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"^\| name \| class \|.*?(?=\n\n)", re.MULTILINE | re.DOTALL)

if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    save_small(run_example(CODE.findall(text)[0], {}), ROOT / IMAGE.findall(text)[0])
    README.write_text(TABLE.sub(lambda _: methods_table(), text, count=1), encoding="utf-8")
