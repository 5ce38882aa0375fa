# SPDX-License-Identifier: Apache-2.0
"""The linear-Gaussian solve: ``N(x; m, V_sigma) N(y; b A x, 1 / precision)``, drawn exactly.

Two strategies behind one interface: ``SpectralSolve`` (one scan whose slices lie along an axis of
the image) and ``ImageSpaceSolve`` (any linear operators, by conjugate gradients).
"""
