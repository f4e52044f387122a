"""A process whose Python seems to be another one than that of the others."""

import os
import platform

from virst_jax.parallel import processes

if os.environ["JAX_PROCESS_ID"] == "1":
    platform.python_version = lambda: "3.0.1"
processes.start()
