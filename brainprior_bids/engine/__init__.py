# SPDX-License-Identifier: Apache-2.0
"""Posterior sampling under a diffusion prior; needs torch and numpy only, not files or BIDS."""
