# SPDX-License-Identifier: Apache-2.0
"""Reportlets and the report of a subject."""
