"""The device: what it is and in which state, as far as it tells."""

from __future__ import annotations

import os
import platform
import re
import shutil
import statistics
import subprocess
from collections.abc import Mapping
from typing import Any

from .reading import numbers, read

#: of a CPU in low precision, in Linux's words: x86, then Arm
ABILITIES = (
    *("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "avx512_bf16", "amx_bf16"),
    *("asimddp", "i8mm", "bf16"),
)


def device(with_gpu: bool) -> dict[str, Any]:
    """Describe the device and its settings, without host or user names; None where it does not tell."""
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    clocks = _tool("jetson_clocks", "--show")
    return {
        "cpu": _cpu(),
        "machine": platform.machine(),
        "abilities": _abilities(),
        "cores": os.cpu_count(),
        "affinity": ",".join(map(str, affinity)) if affinity else None,
        "governor": read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "power_mode": _power_mode(),
        # of a Jetson: each cluster's and the GPU's limits, without what they are at the moment
        "clocks": "; ".join(re.findall(r"^(?:cpu\d+|GPU|EMC)\b.*?Max\w*=\d+", clocks, re.MULTILINE)) or None,
        **(_gpu("name", "driver_version", "power.limit") if with_gpu else {}),
        # the numbers of the kernel's release only: the rest may name whoever built or hosts it
        "os": f"{platform.system()} {''.join(re.findall(r'^[0-9.]+', platform.release()))}".strip(),
        "python": platform.python_version(),
    }


def state(with_gpu: bool) -> dict[str, Any]:
    """Read what changes while one measures: load, clocks, temperatures, throttling."""
    khz = numbers("/sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq")
    mhz = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", read("/proc/cpuinfo") or "", re.MULTILINE)
    millicelsius = numbers("/sys/class/thermal/thermal_zone*/temp")
    throttled = numbers("/sys/devices/system/cpu/cpu*/thermal_throttle/core_throttle_count")
    return {
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "cpu_mhz": round(statistics.mean(khz) / 1e3 if khz else statistics.mean(map(float, mhz)))
        if khz or mhz
        else None,
        "hottest_c": max(millicelsius) / 1e3 if millicelsius else None,
        "throttle_count": sum(throttled) if throttled else None,
        "tegrastats": _tegrastats(),
        **(_gpu("clocks.sm", "temperature.gpu", "clocks_throttle_reasons.active") if with_gpu else {}),
    }


def _cpu() -> str | None:
    names = re.findall(r"^model name\s*:\s*(.+)$", read("/proc/cpuinfo") or "", re.MULTILINE)
    board = (read("/proc/device-tree/model") or "").strip("\0")  # ARM boards name themselves here
    return board or (names[0].strip() if names else platform.processor()) or None


def _abilities() -> str | None:
    """Return those of ABILITIES that the CPU has, as Linux tells; None where it does not."""
    listed = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", read("/proc/cpuinfo") or "", re.MULTILINE)
    return " ".join(sorted(set(listed.group(1).split()) & set(ABILITIES))) if listed else None


def overflows(environment: Mapping[str, Any]) -> bool:
    """Tell whether a CPU adds products of INT8 two by two in 16 bits: one of x86 that is known to lack VNNI and AMX."""
    known = environment.get("abilities")
    return (
        known is not None
        and environment["machine"] in ("x86_64", "AMD64", "i686")
        and not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(known.split())
    )


def _power_mode() -> str | None:
    jetson = re.search(r"^NV Power Mode:\s*(.+)$", _tool("nvpmodel", "-q"), re.MULTILINE)
    return jetson.group(1).strip() if jetson else read("/sys/firmware/acpi/platform_profile")


def _tegrastats() -> str | None:
    """Take one line of a Jetson's tegrastats, which itself never ends."""
    program = shutil.which("tegrastats")
    if program is None:
        return None
    process = subprocess.Popen([program, "--interval", "100"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        return process.stdout.readline().decode(errors="replace").strip() or None
    finally:
        process.kill()
        process.communicate()


def _gpu(*fields: str) -> dict[str, str | None]:
    command = ("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0")
    values = [value.strip() for value in _tool(*command).split(",")]
    names = ["gpu_" + re.sub(r"_version|[.]gpu", "", field).replace(".", "_") for field in fields]
    return dict(zip(names, values)) if len(values) == len(fields) else dict.fromkeys(names)


def _tool(name: str, *arguments: str) -> str:
    """Return what a program of the device prints, or nothing where it is not there or fails."""
    program = shutil.which(name)
    if program is None:
        return ""
    try:
        return subprocess.check_output([program, *arguments], stderr=subprocess.DEVNULL, timeout=10).decode(
            errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return ""
