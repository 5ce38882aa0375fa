# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration: ``make docs``, or ``sphinx-build -W docs docs/_build`` with the extra
``docs`` installed. The build executes the tutorial, whose results stay in ``docs/_build`` until
the tutorial changes."""

import os
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ConfigError

from brainprior_bids import __version__
from brainprior_bids.evaluation.stamp import (
    MEASURED,
    check_pages,
    check_tables,
    shipped_weights,
    with_note,
)

os.environ.setdefault("OMP_NUM_THREADS", "1")  # waiting threads spin where other programs run
os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # a warning of the kernel's debugger

project = "brainprior"
author = "the brainprior developers"
release = version = __version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinxarg.ext",
]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_cache_path = str(Path(__file__).parent / "_build" / ".jupyter_cache")
nb_execution_timeout = 1800  # seconds per cell: only to end what hangs
nb_execution_raise_on_error = True
nb_merge_streams = True
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings name types, shapes and units
exclude_patterns = ["_build", "jupyter_execute", "tables"]
html_extra_path = ["sample"]
html_static_path = ["_static"]
html_theme = "alabaster"
html_theme_options = {
    "description": "Brain MRI restored with a 3-D diffusion prior",
    "page_width": "1100px",
}


def setup(app: Sphinx) -> None:
    """A table that is not of ``brainprior evaluate`` with the shipped weights ends the build, or
    has a note if it is listed.
    """
    app.add_config_value("shipped", shipped_weights(), "env")  # new weights: all pages again
    app.connect("builder-inited", _check_tables)
    app.connect("include-read", _note_older_weights)


def _check_tables(app: Sphinx) -> None:
    docs = Path(__file__).parent
    problems = check_tables(docs / "tables", app.config.shipped, docs.parent / MEASURED)
    problems += check_pages(docs)
    if problems:
        raise ConfigError("\n".join(["Tables of results:", *problems]))


def _note_older_weights(app: Sphinx, path: Path, page: str, content: list[str]) -> None:
    if path.parent.name == "tables":
        content[0] = with_note(path.name, content[0], app.config.shipped)
