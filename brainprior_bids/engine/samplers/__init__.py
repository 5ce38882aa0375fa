# SPDX-License-Identifier: Apache-2.0
"""Posterior samplers; ``registry`` has the facts of each."""
