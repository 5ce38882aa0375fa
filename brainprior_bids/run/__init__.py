# SPDX-License-Identifier: Apache-2.0
"""A run, from its settings to an exit code: plan, execute, outcome, progress, resources, Slurm."""
