"""How tests have XLA compile: most programs are run once, so that compiling takes longer than running."""

import os

LEVEL = "--xla_backend_optimization_level=0"
# Whether two programs round a product alike is up to XLA. With its newer emitters they do in those tests that ask for
# the same bits; `./test` does without, for compiling takes a third less.
SAME_BITS = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": True}


def flags(devices: int) -> str:
    """XLA_FLAGS of another process, which has so many CPU devices and compiles as this one does."""
    return f"--xla_force_host_platform_device_count={devices} {os.environ.get('XLA_FLAGS') or LEVEL}"
