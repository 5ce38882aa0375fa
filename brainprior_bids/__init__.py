# SPDX-License-Identifier: Apache-2.0
"""Restore brain MRI with a 3-D diffusion prior: a BIDS App."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("brainprior")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
