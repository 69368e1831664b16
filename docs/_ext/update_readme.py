"""Write the table of methods into the README: ``python docs/_ext/update_readme.py``."""

from __future__ import annotations

import re

from generated_pages import ROOT, methods_table

README = ROOT / "README.md"
TABLE = re.compile(r"^\| name \| class \|.*?(?=\n\n)", re.MULTILINE | re.DOTALL)

text = README.read_text(encoding="utf-8")
README.write_text(TABLE.sub(lambda _: methods_table(), text, count=1), encoding="utf-8")
