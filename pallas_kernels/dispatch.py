"""Which implementation runs: by platform, capability, dtype and shape; or the one that was asked for.

The choice is made while a function is traced, from the device that it is traced for: the mesh's abstract device where
there is one (compiling for a GPU that is not there), else the default device.
"""

import dataclasses
import functools
import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax

ENVIRONMENT = "JPAGED_KERNELS"
IMPLEMENTATIONS = ("auto", "xla", "triton", "mosaic", "jax_triton")


class Unsupported(ValueError):
    """The implementation that was asked for does not take these arguments on this device; says why."""


@dataclasses.dataclass(frozen=True)
class Device:
    """What the kernels want to know of a device."""

    platform: str
    """"cpu", "cuda", "rocm", "tpu"."""
    capability: int
    """CUDA compute capability times 10 (H100: 90); 0 elsewhere."""
    kind: str = ""
    """Of an NVIDIA GPU, as JAX calls it: "NVIDIA H200"."""


INTERPRETED = {"triton": Device("cuda", 100), "mosaic": Device("cuda", 90), "jax_triton": Device("cuda", 100)}
"""Interpreted kernels take whatever the newest device takes that they are for."""

_ATTENTION = ("paged_decode_attention", "paged_prefill_attention")
ONLY = {"mosaic": _ATTENTION, "jax_triton": ("paged_decode_attention",)}
"""Operations of the implementations that have not all; where one of these is asked for, the others are Triton's."""

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
        words = abstract.device_kind.replace("-", " ").split()
        return Device("cuda", max((_CAPABILITIES.get(word, 0) for word in words), default=0), abstract.device_kind)
    device = jax.config.jax_default_device
    if not isinstance(device, jax.Device):
        device = jax.devices(device)[0] if device else jax.devices()[0]
    if device.platform != "gpu":
        return Device(device.platform, 0)
    if "rocm" in device.client.platform_version.lower():
        return Device("rocm", 0)
    return Device("cuda", int(float(device.compute_capability) * 10 + 0.5), device.device_kind)


def requested(implementation: str | None) -> str:
    """The argument, or else the environment's JPAGED_KERNELS, or else "auto".

    Raises:
      ValueError: there is no such implementation.
    """
    name = implementation or os.environ.get(ENVIRONMENT) or "auto"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"no implementation {name!r}: take one of {', '.join(IMPLEMENTATIONS)}")
    return name


def choose(package: str, operation: str, asked: str | None, *arguments: Any, device: Device) -> tuple[str, str | None]:
    """(Module that runs an operation of a package on a device, why it is not the one that is made for the device).

    Args:
      package: its import name.
      asked: "auto", the name of a module, or None: the environment's.
      arguments: what the module's `unsupported(*arguments, device)` wants to know, to give a reason or None.

    Raises:
      ValueError: what was asked for is unknown.
      Unsupported: it does not support these arguments.
    """
    name = requested(asked)
    if name == "xla" or (name == "auto" and device.platform != "cuda"):
        return "xla", None
    backend = name if operation in ONLY.get(name, ()) else "triton"
    kernels = importlib.import_module(f"{package}.{backend}")
    reason = kernels.unsupported(*arguments, device if device.platform == "cuda" else INTERPRETED[backend])
    if reason is None:
        return backend, None
    if name == "auto":
        return "xla", reason
    raise Unsupported(f"{operation} in {backend} {reason}: leave the implementation to be chosen, or ask for xla")


def implementation(package: str, operation: str, asked: str | None, *arguments: Any) -> Callable:
    """The function that runs an operation: that of the module which `choose` finds for the device that is traced for.

    An implementation asked for by name runs interpreted where there is no GPU. Where a GPU has no kernel for the
    arguments, a warning says that XLA is slower. Pallas is imported when it is wanted: it takes a third of a second.
    """
    device = current_device()
    backend, reason = choose(package, operation, asked, *arguments, device=device)
    if reason:
        warnings.warn(f"{operation} runs in XLA, which is slower: the kernel {reason}", stacklevel=2)
    function = getattr(importlib.import_module(f"{package}.{backend}"), operation)
    return function if backend == "xla" else functools.partial(function, interpret=device.platform != "cuda")
