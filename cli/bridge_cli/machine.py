"""What figures are named after: the processor or the GPU that they were measured on."""

from pathlib import Path


def processor() -> str:
    """The processor's name, as its maker gives it where the system tells."""
    import platform

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def device_name(device: str, backend: str = "torch") -> str:
    """The name of what figures are of: the processor, or the GPU where torch tells of it."""
    if device.startswith("cuda") and backend == "torch":
        import torch

        return torch.cuda.get_device_name(device)
    return processor()
