# SPDX-License-Identifier: Apache-2.0
"""From a raw scan to brain mask, structures, bias field and affine to MNI305."""
