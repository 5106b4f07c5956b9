"""How much others took while one measured, and of what memory."""

from __future__ import annotations

import os
import re
import time

from .reading import read, read_all


def counters() -> dict[str, float | None]:
    """Read what grows: seconds of this process and of the machine, and forced task switches."""
    waited_ns = [int(line.split()[1]) for line in read_all("/proc/self/task/*/schedstat")]
    forced = re.findall(r"^nonvoluntary_ctxt_switches:\s*(\d+)", "\n".join(read_all("/proc/self/task/*/status")), re.M)
    ticks = re.findall(r"\d+", (read("/proc/stat") or "").partition("\n")[0])
    busy = stolen = None
    if len(ticks) >= 8:
        user, nice, system, _, _, irq, softirq, steal = (int(n) / os.sysconf("SC_CLK_TCK") for n in ticks[:8])
        busy, stolen = user + nice + system + irq + softirq, steal
    return {
        "own": time.process_time(),
        "waited": sum(waited_ns) / 1e9 if waited_ns else None,
        "forced": sum(map(int, forced)) if forced else None,
        "busy": busy,
        "stolen": stolen,
    }


def interference(
    before: dict[str, float | None], after: dict[str, float | None], seconds: float
) -> dict[str, float | None]:
    """Say per second of measuring how much others took; None where the system does not tell."""

    def rate(name: str) -> float | None:
        old, new = before[name], after[name]
        return None if old is None or new is None else round((new - old) / seconds, 4)

    own, busy = rate("own"), rate("busy")
    return {
        # seconds of computing by this process
        "cpu_per_wall": own,
        # seconds that its threads were ready to run and waited for a core
        "waited_for_core": rate("waited"),
        "forced_switches_per_s": rate("forced"),
        # cores that everything else kept busy; the kernel counts in hundredths of a second
        "cores_busy_elsewhere": None if busy is None or own is None else round(max(0.0, busy - own), 2),
        # cores that the hypervisor took away
        "cores_stolen": rate("stolen"),
    }


def peak_rss_mb() -> float | None:
    """Return the most memory that this process has had, in MB."""
    peak = re.search(r"^VmHWM:\s*(\d+) kB", read("/proc/self/status") or "", re.MULTILINE)
    return round(int(peak.group(1)) / 1024, 1) if peak else None
