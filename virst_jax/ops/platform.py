"""Which kind of device is traced for."""

import jax


def target_platform() -> str:
    """cpu, gpu or tpu: of the mesh in use (which may be compiled for from elsewhere), or else the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if platform == "cuda" else platform
