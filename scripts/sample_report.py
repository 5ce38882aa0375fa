#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Copy a participant's report into the documentation, with smaller pictures.

    .venv/bin/python scripts/sample_report.py demo/out docs/sample/sample-report

The embedded pictures are reduced to 16 grey levels or 64 colours, so that the whole report takes
less than a megabyte; nothing else is changed.
"""

from __future__ import annotations

import argparse
import base64
import re
from io import BytesIO
from pathlib import Path

from PIL import Image

LEVELS = {"L": 16, "RGB": 64}
VIEWERS = re.compile(r'<p class="viewers">.*?</p>', re.DOTALL)
"""Links to the viewer's pages, which are too large for a repository."""
PNG = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=\s]+)")


def smaller(match: re.Match[str]) -> str:
    """The embedded picture with a palette, if that is shorter."""
    picture = Image.open(BytesIO(base64.b64decode(match[1])))
    if picture.mode not in LEVELS:
        return match[0]
    out = BytesIO()
    picture.quantize(LEVELS[picture.mode], dither=Image.Dither.NONE).save(
        out, "png", optimize=True
    )
    text = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    return min(text, match[0], key=len)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Copy a report with smaller pictures.")
    parser.add_argument("output_dir", type=Path, help="output folder of a run")
    parser.add_argument("out", type=Path, help="folder of the copy")
    args = parser.parse_args()
    files = [args.output_dir / "sub-01.html"]
    files += sorted((args.output_dir / "sub-01" / "figures").glob("*.svg"))
    size = 0
    for path in files:
        target = args.out / path.relative_to(args.output_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = VIEWERS.sub("", PNG.sub(smaller, path.read_text("utf-8")))
        target.write_text("".join(f"{line.rstrip()}\n" for line in text.splitlines()), "utf-8")
        size += target.stat().st_size
    print(f"{args.out}: {len(files)} files, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
