"""GPUs that one can compile for without having them: what XLA wants to know of each, from the makers' data sheets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU as XLA's compiler sees it."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int
    """Bytes of one multiprocessor."""
    memory: int
    """Bytes."""
    bandwidth: int
    """Bytes/s of the memory."""
    l2_cache: int
    """Bytes."""
    clock_ghz: float
    float32_lanes: int
    """Of one multiprocessor."""
    tensor_rate: int
    """Operations (a product and a sum are two) of one multiprocessor's tensor cores in a cycle: dense, 16 bits."""

    @property
    def architecture(self) -> str:
        """As ptxas calls it. From Hopper on, the instructions of that very architecture are used: "a"."""
        major, minor = self.capability
        return f"sm_{major}{minor}{'a' if major >= 9 else ''}"

    def config(self) -> str:
        """XLA's GpuTargetConfigProto, as text."""
        major, minor = self.capability
        features = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
        device = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 48 << 10,
            "shared_memory_per_core": self.shared_memory,
            "shared_memory_per_block_optin": self.shared_memory - 1024,  # the driver keeps one KiB
            "threads_per_core_limit": 2048,
            "core_count": self.multiprocessors,
            "fpus_per_core": self.float32_lanes,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 65535,
            "block_dim_limit_z": 65535,
            "thread_dim_limit_x": 1024,
            "thread_dim_limit_y": 1024,
            "thread_dim_limit_z": 64,
            "memory_bandwidth": self.bandwidth,
            "l2_cache_size": self.l2_cache,
            "clock_rate_ghz": self.clock_ghz,
            "device_memory_size": self.memory,
            "registers_per_core_limit": 65536,
            "registers_per_block_limit": 65536,
            "device_address_bits": 64,
        }
        lines = [f"{key}: {value}" for key, value in device.items()]
        lines += [f'{key}: "13.0.0"' for key in ("driver_version", "runtime_version", "compile_time_toolkit_version")]
        lines += ['dnn_version: "9.10.0"', f'name: "{self.name}"']
        lines += [f"cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}"]
        return (
            f'gpu_device_info {{ {" ".join(lines)} }} platform_name: "CUDA" '
            f'dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{self.name}"'
        )


TARGETS = {
    target.architecture: target
    for target in (
        Target("NVIDIA A100", (8, 0), 108, 164 << 10, 80 << 30, 2_039_000_000_000, 40 << 20, 1.41, 64, 2048),
        Target("NVIDIA H200", (9, 0), 132, 228 << 10, 141 << 30, 4_800_000_000_000, 50 << 20, 1.98, 128, 4096),
        Target("NVIDIA B200", (10, 0), 148, 228 << 10, 178 << 30, 7_672_000_000_000, 126 << 20, 1.965, 128, 8192),
    )
}
