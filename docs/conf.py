# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration: ``make docs``, or ``sphinx-build -W docs docs/_build`` with the extra
``docs`` installed."""

from brainprior_bids import __version__

project = "brainprior"
author = "the brainprior developers"
release = version = __version__
extensions = ["myst_parser", "sphinxarg.ext"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {
    "description": "Brain MRI restored with a 3-D diffusion prior",
    "page_width": "1100px",
}
