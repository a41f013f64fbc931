"""Which implementation runs: by platform, capability, dtype and shape; or the one that was asked for.

The choice is made while a function is traced, from the device that it is traced for: the mesh's abstract device where
there is one (compiling for a GPU that is not there), else the default device.
"""

import dataclasses
import os

import jax

ENVIRONMENT = "JPAGED_KERNELS"
IMPLEMENTATIONS = ("auto", "xla", "triton", "mosaic")


@dataclasses.dataclass(frozen=True)
class Device:
    """What the kernels want to know of a device."""

    platform: str
    """"cpu", "cuda", "rocm", "tpu"."""
    capability: int
    """CUDA compute capability times 10 (H100: 90); 0 elsewhere."""


INTERPRETER = Device("cuda", 100)
"""Interpreted kernels take whatever the newest device takes."""

# Kinds of the abstract devices that one compiles for without having them; a real device tells its capability itself.
_CAPABILITIES = {
    "A100": 80,
    "A30": 80,
    "A10": 86,
    "L4": 89,
    "L40": 89,
    "H100": 90,
    "H200": 90,
    "B200": 100,
    "B300": 103,
}


def current_device() -> Device:
    """The device that is traced for."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None and abstract.platform in ("cuda", "gpu"):
        words = abstract.device_kind.split()
        return Device("cuda", max((_CAPABILITIES.get(word, 0) for word in words), default=0))
    device = jax.config.jax_default_device
    if not isinstance(device, jax.Device):
        device = jax.devices(device)[0] if device else jax.devices()[0]
    if device.platform != "gpu":
        return Device(device.platform, 0)
    if "rocm" in device.client.platform_version.lower():
        return Device("rocm", 0)
    return Device("cuda", int(float(device.compute_capability) * 10 + 0.5))


def requested(implementation: str | None) -> str:
    """The argument, or else the environment's JPAGED_KERNELS, or else "auto".

    Raises:
      ValueError: there is no such implementation.
    """
    name = implementation or os.environ.get(ENVIRONMENT) or "auto"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"no implementation {name!r}: take one of {', '.join(IMPLEMENTATIONS)}")
    return name
