# SPDX-License-Identifier: Apache-2.0
"""The Nipype graphs; installed as brainprior_bids.workflows."""
