"""NVIDIA GPUs that are not there, for jax to compile for: needs its CUDA plugin, but no GPU."""

from kernels.chips import Chip

# What the driver reports of an SXM module, in the text form of XLA's GpuTargetConfigProto.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
  device_vendor: "NVIDIA Corporation"
  device_address_bits: 64
  name: "{name}"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
_NAMES = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200 141GB HBM3e"}
_MEMORY = {"h100": 85017755648, "h200": 151397597184}

DESCRIBED = tuple(_NAMES)
"""The chips that can be compiled for without one; of others the driver's answers are not known."""


def description(chip: Chip) -> str:
    """What `topologies.get_topology_desc` takes as `target_config`; of one of `DESCRIBED`."""
    bandwidth, memory = round(chip.bandwidth * 1e12), _MEMORY[chip.name]
    return _HOPPER.format(name=_NAMES[chip.name], bandwidth=bandwidth, memory=memory)
