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
    "sphinx_gallery.gen_gallery",
]
# The pages named plot_* are run, a few minutes in all; their figures stand beside the code.
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "examples",
    "filename_pattern": "plot_",
    "ignore_pattern": "demo",  # a program of its own, with arguments
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
}
# Figures are remembered by what made them, which no pickle can be held against.
suppress_warnings = ["config.cache"]
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
