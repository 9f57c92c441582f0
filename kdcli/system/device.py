"""Devices: which one to use, the precision each computes fastest, free memory, and out-of-memory errors."""

import torch

from kdcli.errors import RecipeError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick(name: str | None) -> torch.device:
    """The named device; for None or "auto" the best one. Raises RecipeError for a device that this machine lacks."""
    if name in (None, "auto"):
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(str(name))
    except RuntimeError:
        raise RecipeError(f"--device {name}: no such device", hint="Allowed: auto, cpu, cuda, cuda:N, mps.") from None
    cure = "Leave --device out to use the best device of this machine; `kdcli doctor` shows it."
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"--device {name}: this machine has no CUDA device that torch can use", hint=cure)
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise RecipeError(f"--device {name}: this machine has only {torch.cuda.device_count()} CUDA devices", hint=cure)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise RecipeError(f"--device {name}: this machine has no Apple GPU that torch can use", hint=cure)
    if device.type not in ("cpu", "cuda", "mps"):
        raise RecipeError(f"--device {name}: kdcli runs on cpu, cuda and mps", hint=cure)
    return device


def has_bf16_units(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 on a device: CUDA from Ampere on, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # private; False where torch lacks them
        return any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return False


def precision(setting: str, device: torch.device, *, frozen: bool) -> tuple[str, str]:
    """The precision to run at, and why. With `auto`, `frozen` networks run in bfloat16 where it is fast, students only
    on CUDA.

    Raises RecipeError for fp16 on a CPU.
    """
    if setting == "auto":
        units = has_bf16_units(device)
        if units and (frozen or device.type == "cuda"):
            return "bf16", "this device computes bfloat16 fast"
        return "fp32", "students train in float32 on this device" if units else "this device has no fast bfloat16"
    if setting == "fp16" and device.type == "cpu":
        raise RecipeError(
            "fp16 on a CPU: float16 convolutions are slower than float32 there",
            hint="Use precision = bf16 or fp32, or a CUDA device.",
        )
    return setting, "as the recipe says"


def dtype_of(name: str) -> torch.dtype:
    return DTYPES[name]


def describe(device: torch.device) -> str:
    """A device's name for provenance and tables."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return str(device)


def _cpu_name() -> str:
    import platform
    from pathlib import Path

    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def free_memory(device: torch.device) -> int | None:
    """Bytes of free memory on `device`; None where it cannot be determined (Windows)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    import os
    from pathlib import Path

    found = []
    if (info := Path("/proc/meminfo")).is_file():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:  # all memory: how much is in use is unknown
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limits = [Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory/memory.limit_in_bytes")]  # of a container
    texts = [limit.read_text().strip() for limit in limits if limit.is_file()]
    return min([*found, *(int(text) for text in texts if text.isdigit())], default=None)


def out_of_memory(error: BaseException) -> bool:
    """Whether torch ran out of memory: an error class on CUDA, a RuntimeError with these phrases on CPUs and MPS."""
    phrases = ("out of memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)
    )
