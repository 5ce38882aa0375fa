# SPDX-License-Identifier: Apache-2.0
"""``python -m brainprior_bids`` is ``brainprior``."""

import sys

from brainprior_bids.cli.run import main

if __name__ == "__main__":  # worker processes import this module too
    sys.exit(main())
