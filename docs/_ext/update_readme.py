"""Write the table of methods into the README: ``python docs/_ext/update_readme.py``."""

from __future__ import annotations

import re

from generated_pages import ROOT, methods_table

file = ROOT / "README.md"
text = file.read_text(encoding="utf-8")
table = re.compile(r"^\| name \| class \|.*?(?=\n\n)", re.MULTILINE | re.DOTALL)
file.write_text(table.sub(lambda found: methods_table(), text, count=1), encoding="utf-8")
