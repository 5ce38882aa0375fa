# SPDX-License-Identifier: Apache-2.0
"""Degradations, baselines and metrics, coded apart from the engine's operators."""
