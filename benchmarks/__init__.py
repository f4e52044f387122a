"""Scripts that measure."""

import sys
from collections.abc import Callable

from virst_jax.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Calls `main`; bad input ends the program with one line and status 2."""
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
