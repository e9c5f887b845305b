"""Sphinx: the pages of this folder as a site (`make docs`).

The pages stay plain Markdown that reads anywhere; headings get the anchors that code hosts give
them, so that one form of link works in both.
"""

from importlib.metadata import version as installed_version

project = "compression-manager"
copyright = "the compression-manager authors, Apache-2.0"
release = version = installed_version("compression-manager")

extensions = ["myst_parser"]
myst_heading_anchors = 4
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"compression-manager {release}"
html_show_sourcelink = False
