"""How many 32x32 images one thread crops, flips and normalises per second. Run: python benchmarks/augmentation.py."""

import statistics
import time

import torch

from bar_edge.data.augment import Draws, crop_and_flip, normalise

torch.set_num_threads(1)
images = torch.randint(0, 256, (128, 32, 32, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
draws = Draws.of(128, 32, seed=0, epoch=0)
seconds = []
for _ in range(200):
    start = time.perf_counter()
    normalise(crop_and_flip(images, draws.rows, draws.columns, draws.flip, ("crop", "flip")), (0.5,) * 3, (0.2,) * 3)
    seconds.append(time.perf_counter() - start)
low, median, high = statistics.quantiles(seconds, n=4)
print(f"{128 / median:,.0f} images/s (quartiles {128 / high:,.0f} to {128 / low:,.0f}), batch 128, n = {len(seconds)}")
