"""Sphinx configuration: `make docs` builds the site offline, from docstrings, notebooks and the runs it trains."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lorascope

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "lorascope"
author = "the lorascope developers"
copyright = "2026, the lorascope developers"
version = release = lorascope.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
    "sphinx_design",
    "numpydoc",
    "myst_nb",
    "generated_pages",
    "function_lists",
]
exclude_patterns = ["_build", "_ext", "_static", "_templates"]
templates_path = ["_templates"]

html_theme = "pydata_sphinx_theme"
html_title = "lorascope"
html_static_path = ["_static"]
html_css_files = ["lorascope.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "navbar_align": "left",
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": False,
    "pygments_light_style": "tango",
    "pygments_dark_style": "monokai",
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars = {"index": [], "cheat-sheet": [], "glossary": [], "changelog": []}

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Interactive figures: a div and a script per figure, and plotly.js once per page that has one (see generated_pages).
os.environ["PLOTLY_RENDERER"] = "sphinx_gallery"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # they would come from a network

# Notebooks and guides run at build; an error in a cell fails the build. Outputs are kept by the code of the cells.
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / "notebooks")
nb_execution_in_temp = True
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars and warnings of other libraries
nb_render_markdown_format = "myst"

autodoc_typehints = "none"  # numpydoc's parameter tables state the types
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
