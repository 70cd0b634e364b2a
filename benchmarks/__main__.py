"""`make bench`: everything that this machine's CPU can be measured by, as `tidar-kernels bench` does.

python -m benchmarks --out DIR [PART ...]
"""

from __future__ import annotations

import sys

from tidar_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
