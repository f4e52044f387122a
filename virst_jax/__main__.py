"""`python -m virst_jax` is `virst`."""

import sys

from virst_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
