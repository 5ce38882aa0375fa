# SPDX-License-Identifier: Apache-2.0
"""Posterior samplers: daps (faithful), exact (default)."""
