"""What a latency depends on besides the model: device and operating system, without host or user names."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def environment() -> dict[str, str | int | float | None]:
    """Describe the machine; None where it does not tell."""
    return {
        "cpu": _cpu(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "affinity": ",".join(map(str, sorted(os.sched_getaffinity(0)))) if hasattr(os, "sched_getaffinity") else None,
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        # the numbers of the kernel's release only: the rest may name whoever built or hosts it
        "os": f"{platform.system()} {''.join(re.findall(r'^[0-9.]+', platform.release()))}".strip(),
        "python": platform.python_version(),
    }


def _cpu() -> str | None:
    names = re.findall(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo") or "", re.MULTILINE)
    board = (_read("/proc/device-tree/model") or "").strip("\0")  # ARM boards name themselves here
    return names[0].strip() if names else board or platform.processor() or None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
