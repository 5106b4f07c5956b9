"""Two tasks beyond classification on one path: a U-Net (mean IoU) and a two-head detector (AP), BAR at 4x volume.

Canvases of 32x32 pixels hold two to four of scikit-learn's digits on noise, the training canvases those of the
training split of `digits`, the test canvases those of its test split. The detector shows what is the user's to
write: data with structured targets, a network with two outputs, a task. Run: python benchmarks/beyond_classification.py
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bar_edge.config import BarConfig, TrainConfig
from bar_edge.data.readers import read_digits
from bar_edge.files import read_json, write_json
from bar_edge.pipeline import prune
from bar_edge.requests import PruneRequest

SIZE, DIGIT, STRIDE = 32, 8, 4
GRID = SIZE // STRIDE
TRAIN, TEST = 2000, 500
#: the digits 0, 1, ... that are drawn; a network of a quarter of the volume has few channels at full resolution
KINDS = 4
#: grey levels out of 255: of the noise at most, and from where a digit's pixel counts as ink
NOISE, INK = 64, 80
HERE = os.path.relpath(__file__)

# --- data


@dataclasses.dataclass(frozen=True)
class Canvases:
    """A map-style data set of (image, target); images: uint8 (N, 1, 32, 32)."""

    images: Tensor
    #: one item per image
    targets: list[Any]
    classes: tuple[str, ...] = ("background", *map(str, range(KINDS)))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self.images[index], self.targets[index]


@dataclasses.dataclass(frozen=True)
class Canvas:
    """An image (32, 32), its mask (32, 32) of classes, 0 = background, and (class, frame's corner, box) per digit."""

    image: Tensor
    mask: Tensor
    #: box: (left, top, right, bottom) of the ink, in pixels
    digits: list[tuple[int, tuple[int, int], tuple[int, int, int, int]]]


def draw(digits: Tensor, labels: Tensor, number: int, seed: int) -> list[Canvas]:
    """Compose canvases of digits uint8 (n, 1, 8, 8) with classes (n,), whose frames do not overlap."""
    random = np.random.default_rng(seed)
    return [_canvas(digits, labels, random) for _ in range(number)]


def _canvas(digits: Tensor, labels: Tensor, random: np.random.Generator) -> Canvas:
    image = torch.from_numpy(random.integers(NOISE, size=(SIZE, SIZE), dtype=np.uint8))
    mask = torch.zeros(SIZE, SIZE, dtype=torch.int64)
    placed: list[tuple[int, tuple[int, int], tuple[int, int, int, int]]] = []
    wanted = random.integers(2, 5)
    while len(placed) < wanted:
        top, left = (int(v) for v in random.integers(SIZE - DIGIT + 1, size=2))
        if any(abs(top - t) < DIGIT and abs(left - x) < DIGIT for _, (t, x), _ in placed):
            continue
        which = int(random.integers(len(digits)))
        kind, ink = int(labels[which]) + 1, digits[which, 0] >= INK
        frame = slice(top, top + DIGIT), slice(left, left + DIGIT)
        image[frame] = image[frame].maximum(digits[which, 0])
        mask[frame][ink] = kind
        y, x = (ink.any(1 - axis).nonzero()[:, 0] for axis in (0, 1))
        box = (left + int(x[0]), top + int(y[0]), left + int(x[-1]) + 1, top + int(y[-1]) + 1)
        placed.append((kind, (top, left), box))
    return Canvas(image, mask, placed)


def grid_target(canvas: Canvas) -> dict[str, Tensor]:
    """Return class (8, 8), 0 = nothing, and box (4, 8, 8): from a cell's centre to the box's sides, in digit widths.

    A digit belongs to the cell that holds its frame's centre; frames do not overlap, so no cell has two.
    """
    kinds, boxes = torch.zeros(GRID, GRID, dtype=torch.int64), torch.zeros(4, GRID, GRID)
    for kind, (top, left), (x0, y0, x1, y1) in canvas.digits:
        row, column = (top + DIGIT // 2) // STRIDE, (left + DIGIT // 2) // STRIDE
        x, y = (column + 0.5) * STRIDE, (row + 0.5) * STRIDE
        kinds[row, column] = kind
        boxes[:, row, column] = torch.tensor([x - x0, y - y0, x1 - x, y1 - y]) / DIGIT
    return {"class": kinds, "box": boxes}


def canvases(train: int = TRAIN, test: int = TEST) -> tuple[list[Canvas], list[Canvas]]:
    """Return training and test canvases, of disjoint digits."""
    raw = read_digits()
    assert isinstance(raw.train, Tensor) and isinstance(raw.test, Tensor)
    first, second = raw.train_targets < KINDS, raw.test_targets < KINDS
    return (
        draw(raw.train[first], raw.train_targets[first], train, seed=0),
        draw(raw.test[second], raw.test_targets[second], test, seed=1),
    )


def masks(train: int = TRAIN, test: int = TEST) -> tuple[Canvases, Canvases]:
    """Return both splits for segmentation: targets int64 (32, 32)."""
    first, second = (
        Canvases(torch.stack([c.image for c in part])[:, None], [c.mask for c in part])
        for part in canvases(train, test)
    )
    return first, second


def grids(train: int = TRAIN, test: int = TEST) -> tuple[Canvases, Canvases]:
    """Return both splits for detection: targets as `grid_target` makes them."""
    first, second = (
        Canvases(torch.stack([c.image for c in part])[:, None], [grid_target(c) for c in part])
        for part in canvases(train, test)
    )
    return first, second


# --- networks


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Return a 3x3 convolution with BatchNorm and ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    """Three scales, two skips by concatenation, upsampling by transposed convolution (Ronneberger et al. 2015)."""

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__()
        a, b, c = 3 * width, 4 * width, 6 * width
        self.down1 = nn.Sequential(block(1, a), block(a, a))
        self.down2 = nn.Sequential(block(a, b), block(b, b))
        self.bottom = nn.Sequential(block(b, c), block(c, c))
        self.up2, self.up1 = nn.ConvTranspose2d(c, b, 2, stride=2), nn.ConvTranspose2d(b, a, 2, stride=2)
        self.merge2 = nn.Sequential(block(2 * b, b), block(b, b))
        self.merge1 = nn.Sequential(block(2 * a, a), block(a, a))
        self.head = nn.Conv2d(a, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, 1, H, W) to logits (N, classes, H, W)."""
        one = self.down1(images)
        two = self.down2(F.max_pool2d(one, 2))
        three = self.bottom(F.max_pool2d(two, 2))
        two = self.merge2(torch.cat([two, self.up2(three)], dim=1))
        one = self.merge1(torch.cat([one, self.up1(two)], dim=1))
        logits: Tensor = self.head(one)
        return logits


class Detector(nn.Module):
    """A small residual backbone of stride 4 with two heads: what is in a cell, and where its box lies."""

    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        a, b, c = width, 2 * width, 4 * width
        self.stem = nn.Sequential(block(1, a), block(a, b, stride=2), block(b, b), block(b, c, stride=2))
        self.body = nn.ModuleList(nn.Sequential(block(c, c), block(c, c)) for _ in range(2))
        self.kind = nn.Sequential(block(c, c), nn.Conv2d(c, num_classes, 1))
        self.box = nn.Sequential(block(c, b), nn.Conv2d(b, 4, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map (N, 1, H, W) to classes (N, classes, H/4, W/4) and boxes (N, 4, H/4, W/4), as in the targets."""
        features = self.stem(images)
        for residual in self.body:
            features = features + residual(features)
        return self.kind(features), self.box(features)


# --- detection


class Detection:
    """Cross-entropy of cells and smooth L1 of boxes; mean over classes of the average precision at IoU > 0.5.

    Outputs (N, 1 + KINDS, 8, 8) and (N, 4, 8, 8), targets as `grid_target` makes them. Every cell proposes one box, of
    its likeliest digit. There is no `distill`: a task with several heads may leave it out.
    """

    metric_name = "AP50"
    higher_is_better = True
    #: of the scores, in steps of equal log-odds from -MOST to MOST; within one, detections count as tied
    bins, most = 2000, 14.0

    def loss(self, outputs: tuple[Tensor, Tensor], targets: dict[str, Tensor]) -> Tensor:
        """Return the cross-entropy over cells plus smooth L1 over the cells that hold a digit."""
        logits, boxes = (head.float() for head in outputs)
        held = (targets["class"] > 0)[:, None].expand_as(boxes)
        return F.cross_entropy(logits, targets["class"]) + F.smooth_l1_loss(boxes[held], targets["box"][held], beta=0.1)

    def metric(self, outputs: tuple[Tensor, Tensor], targets: dict[str, Tensor]) -> Tensor:
        """Return (KINDS, 2 * bins + 1): histograms of the scores of false and of true detections, and how many truths.

        True is, of the boxes that fit a digit, the one of highest score. As digits do not overlap, no box fits two.
        """
        logits, labels = outputs[0].float().flatten(2), targets["class"].flatten(1)
        scores, kinds = logits.softmax(dim=1)[:, 1:].max(dim=1)
        fits = _iou(_corners(outputs[1].float()), _corners(targets["box"])) > 0.5
        fits &= kinds[:, :, None] + 1 == labels[:, None, :]
        first = torch.where(fits, scores[:, :, None], -1.0).argmax(dim=1)
        cells = torch.arange(labels.shape[1], device=labels.device)
        true = (fits & (cells[:, None] == first[:, None, :])).any(dim=2)
        odds = torch.logit(scores, eps=1e-6).clamp(-self.most, self.most)
        step = ((odds / self.most + 1) / 2 * (self.bins - 1)).round().long()
        found = torch.bincount(((kinds * 2 + true) * self.bins + step).flatten(), minlength=KINDS * 2 * self.bins)
        truths = torch.bincount(labels.flatten(), minlength=KINDS + 1)[1:]
        return torch.cat([found.view(KINDS, -1), truths[:, None]], dim=1)

    def value(self, counts: Tensor) -> float:
        """Return the mean area under the curve of precision, made monotone, over recall."""
        truths = counts[:, -1:].double()
        false, true = counts[:, :-1].view(KINDS, 2, self.bins).flip(2).cumsum(2).double().unbind(1)
        precision = true / (true + false).clamp(min=1)
        monotone = precision.flip(1).cummax(1).values.flip(1)
        areas = (monotone * (true / truths.clamp(min=1)).diff(dim=1, prepend=torch.zeros_like(truths))).sum(1)
        return float(areas[truths[:, 0] > 0].mean()) if truths.any() else 0.0


def _corners(sides: Tensor) -> Tensor:
    """Return (N, 64, 4) as (left, top, right, bottom) in pixels, of (N, 4, 8, 8)."""
    centre = (torch.arange(GRID, device=sides.device) + 0.5) * STRIDE
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    left, top, right, bottom = (sides * DIGIT).unbind(1)
    return torch.stack([x - left, y - top, x + right, y + bottom], dim=-1).flatten(1, 2)


def _iou(first: Tensor, second: Tensor) -> Tensor:
    """Return (N, n, m) of boxes (N, n, 4) and (N, m, 4); a box without area overlaps nothing."""
    low = torch.maximum(first[:, :, None, :2], second[:, None, :, :2])
    high = torch.minimum(first[:, :, None, 2:], second[:, None, :, 2:])
    common = (high - low).clamp(min=0).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1) for boxes in (first, second)]
    return common / (areas[0][:, :, None] + areas[1][:, None, :] - common).clamp(min=1e-9)


# --- runs

TRAINING = TrainConfig(dense=8, prune=20, tune=14, batch=16, lr_tune=0.05, threads=1, device="cpu")
#: the final budget comes near in even steps: at the default, half of the gates close within a tenth of the schedule
BAR = BarConfig(transition="linear")
RUNS = {
    "segmentation": PruneRequest(
        model=f"{HERE}:UNet", data=f"{HERE}:masks", task="segmentation", budget="4x", train=TRAINING, bar=BAR
    ),
    "detection": PruneRequest(
        model=f"{HERE}:Detector", data=f"{HERE}:grids", task=f"{HERE}:Detection", budget="4x", train=TRAINING, bar=BAR
    ),
}


def figures(config: PruneRequest, folder: Path) -> dict[str, Any]:
    """Prune by the ordinary path; return what the result says in a few numbers."""
    start = time.perf_counter(), time.process_time()
    result = prune(config, folder)
    spent = time.perf_counter() - start[0], time.process_time() - start[1]
    dense, sliced = result["dense"], result["sliced"]
    return {
        "metric": result["metric"]["name"],
        "dense": dense["metric"],
        "pruned": sliced["metric"],
        "drop_points": 100 * (dense["metric"] - sliced["metric"]),
        "params": [dense["params"], sliced["params"]],
        "volume": [dense["volume"], sliced["volume"]],
        "volume_factor": dense["volume"] / sliced["volume"],
        "flops_factor": dense["flops"] / sliced["flops"],
        "within": result["budget"]["within"],
        "parity": result["parity"]["masked_vs_sliced"],
        "seconds": spent[0],
        "processor_seconds": spent[1],
        "seed": config.seed,
        "train": dataclasses.asdict(config.train),
        "bar": dataclasses.asdict(config.bar),
        "versions": result["versions"],
    }


def main() -> None:
    """Run both tasks, print a line for each and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/beyond_classification.json"))
    parser.add_argument("--task", choices=RUNS, nargs="*", default=list(RUNS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    done: dict[str, Any] = read_json(options.out) if options.out.is_file() else {}
    for name in options.task:
        with tempfile.TemporaryDirectory() as folder:
            done[name] = figures(dataclasses.replace(RUNS[name], seed=options.seed), Path(folder) / name)
        shown = {
            k: round(v, 4) if isinstance(v, float) else v for k, v in done[name].items() if not isinstance(v, dict)
        }
        print(name, shown, flush=True)
        write_json(options.out, done)


if __name__ == "__main__":
    main()
