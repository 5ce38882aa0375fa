# SPDX-License-Identifier: Apache-2.0
"""``brainprior``: where the process begins and ends.

The command itself is imported inside ``main``: that takes seconds, in which Ctrl-C may come.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from brainprior_bids.run.interrupt import end_silently, interruptible


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns
    -------
    0 every requested scan is done; 1 something failed; 2 the request cannot be carried out;
    130 interrupted.
    """
    code = 130
    try:
        with interruptible():
            from brainprior_bids.cli.command import command
            from brainprior_bids.run.environment import prepare_process

            prepare_process()
            code = command(list(sys.argv[1:] if argv is None else argv))
            sys.stdout.flush()
    except BrokenPipeError as error:  # `brainprior … | head`: the reader has closed the pipe
        print(f"brainprior: stopped: {error}", file=sys.stderr)
        closed = os.open(os.devnull, os.O_WRONLY)
        os.dup2(closed, sys.stdout.fileno())  # Python flushes once more when it ends
        os.close(closed)
        code = 1
    except KeyboardInterrupt:
        print("brainprior: interrupted; rerun the same command to resume.", file=sys.stderr)
    if argv is None:
        end_silently(code)
    return code
