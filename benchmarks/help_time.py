"""How long `bar-edge --help` takes: wall and processor seconds, best of ten. Run: python benchmarks/help_time.py."""

import resource
import subprocess
import sys
import time

wall, processor = [], []
for _ in range(10):
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-c", "from bar_edge_cli.main import run; run()", "--help"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall.append(time.perf_counter() - begin)
    processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
print(f"wall {min(wall):.3f} s, processor {min(processor):.3f} s, best of {len(wall)}")
