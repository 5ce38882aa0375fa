# SPDX-License-Identifier: Apache-2.0
"""Every step in this process, one by one: for ``--debug``, and where no worker can start."""

from __future__ import annotations

from nipype.pipeline.plugins import LinearPlugin


class InTurn(LinearPlugin):
    """Nipype's plugin, with the end that the others have."""

    def stop(self) -> None:
        """Nothing runs beside this process."""
