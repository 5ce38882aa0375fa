# SPDX-License-Identifier: Apache-2.0
"""Thin Nipype interfaces: files in, one call, files out."""
