"""The demonstration page: its figures, the code that it shows, and that it needs no torch."""

from __future__ import annotations

import html
import re
import subprocess
import sys

import lorascope as ls
from lorascope.cli.main import main
from lorascope.pages.demo import TOPICS


def test_demo_shows_every_example_without_torch(tmp_path):
    page = tmp_path / "demo.html"
    code = (
        "import sys; from lorascope.cli.main import main; "
        f"code = main(['demo', '-o', {str(page)!r}]); print(code, 'torch' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.splitlines() == [str(page), "0 False"]
    assert {name for topic in TOPICS for name in topic.names} == set(ls.examples().index)
    text = page.read_text(encoding="utf-8")
    assert text.count("<figure") == sum(len(topic.figures) for topic in TOPICS)


def test_titles_of_the_demo_are_code_that_draws_its_figures(tmp_path, capsys):
    page = tmp_path / "demo.html"
    assert main(["demo", "-o", str(page)]) == 0
    titles = re.findall(r"<h3>Figure \d+: (.*?)</h3>", page.read_text(encoding="utf-8"))
    assert len(titles) == sum(len(topic.figures) for topic in TOPICS)
    for title in titles:
        eval(html.unescape(title), {"ls": ls}).plotly()


def test_demo_replaces_only_its_own_page(tmp_path, capsys):
    page = tmp_path / "demo.html"
    page.write_text("mine", encoding="utf-8")
    assert main(["demo", "-o", str(page)]) == 2
    assert page.read_text(encoding="utf-8") == "mine"
