# SPDX-License-Identifier: Apache-2.0
"""Queries, names, derivatives, provenance and status."""
