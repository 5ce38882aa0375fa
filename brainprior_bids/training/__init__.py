# SPDX-License-Identifier: Apache-2.0
"""Synthetic heads and brains; training of the prior and the parcellation."""
