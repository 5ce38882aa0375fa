# SPDX-License-Identifier: Apache-2.0
"""Posterior sampling under a diffusion prior; torch and numpy only, knows no file and no BIDS."""
