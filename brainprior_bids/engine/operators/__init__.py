# SPDX-License-Identifier: Apache-2.0
"""Linear forward models: from the unknown 1 mm brain to what the scanner measured."""
