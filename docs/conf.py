"""How Sphinx makes a site of these pages: python -m sphinx -W --keep-going -b html docs FOLDER (extra: docs)."""

import sys
from pathlib import Path

import nbbn

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "nbbn"
version = release = nbbn.__version__
copyright = "the authors of nbbn, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "docstrings", "frameworks", "public_names"]

html_theme = "furo"
html_title = f"nbbn {release}"

myst_heading_anchors = 3  # links to headings, by the names that GitHub gives them

highlight_language = "text"
smartquotes = False  # "relu" is a string

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
