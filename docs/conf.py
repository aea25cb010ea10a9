"""Sphinx configuration; it builds offline, and the build fails on any warning."""

from sklearn_softeq._version import __version__

project = "sklearn_softeq"
author = "The sklearn_softeq developers"
copyright = "2026, The sklearn_softeq developers"
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "myst_parser",
    "numpydoc",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
source_suffix = {".rst": "restructuredtext", ".md": "markdown"}
myst_heading_anchors = 3

html_theme = "alabaster"
html_theme_options = {
    "description": "Image classifiers that learn the symmetry of each layer",
    "fixed_sidebar": True,
    "page_width": "1080px",
}

autosummary_generate = True
# Members stand on the page of their class; a page for each would be nearly empty.
numpydoc_class_members_toctree = False
numpydoc_show_inherited_class_members = False
