"""Masks, structured targets and several heads on the ordinary path; the task of the benchmark against a plain one."""

import dataclasses
import itertools
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bar_edge.config import DistillConfig, TrainConfig
from bar_edge.data import DataSource, Split, load_data
from bar_edge.data.augment import move
from bar_edge.data.memory import MemorySplit, Pixels
from bar_edge.data.readers import read_digits
from bar_edge.data.source import UNLABELLED
from bar_edge.errors import InputError
from bar_edge.methods import BAR
from bar_edge.network import Network
from bar_edge.pipeline import prune
from bar_edge.progress import NoProgress
from bar_edge.training import Distills, evaluate, load_task
from benchmarks import beyond_classification as beyond

CPU = {"device": "cpu", "precision": "fp32"}


def small_masks() -> tuple[beyond.Canvases, beyond.Canvases]:
    return beyond.masks(80, 16)


def small_grids() -> tuple[beyond.Canvases, beyond.Canvases]:
    return beyond.grids(80, 16)


class Notes(NoProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


# --- canvases


def test_canvases_are_seeded_and_masks_and_grids_tell_the_same() -> None:
    first, again = beyond.canvases(6, 3), beyond.canvases(6, 3)
    for canvas, same in zip(itertools.chain(*first), itertools.chain(*again), strict=True):
        assert torch.equal(canvas.image, same.image) and torch.equal(canvas.mask, same.mask)
        assert 2 <= len(canvas.digits) <= 4
        target = beyond.grid_target(canvas)
        corners = beyond._corners(target["box"][None])[0][target["class"].flatten() > 0]
        assert len(corners) == len(canvas.digits)
        left = canvas.mask.clone()
        for kind, _, (x0, y0, x1, y1) in canvas.digits:
            box = torch.tensor([x0, y0, x1, y1])
            # the grid's numbers are multiples of 1/8: exact
            (cell,) = (target["class"].flatten()[target["class"].flatten() > 0])[(corners == box).all(1)]
            assert cell == kind
            inside = canvas.mask[y0:y1, x0:x1]
            assert set(inside.unique().tolist()) <= {0, kind}
            assert all(side.any() for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
            left[y0:y1, x0:x1] = 0
        assert not left.any()


def test_test_canvases_hold_digits_that_no_training_canvas_holds() -> None:
    raw = read_digits()
    train, test = ({bytes(d.flatten().tolist()) for d in part} for part in (raw.train, raw.test))
    assert train.isdisjoint(test)
    for canvas in beyond.canvases(2, 5)[1]:
        for _, (top, left), _ in canvas.digits:
            frame = canvas.image[top : top + 8, left : left + 8]
            noisy = [frame[d[0] >= beyond.NOISE].equal(d[0][d[0] >= beyond.NOISE]) for d in raw.test]
            assert any(noisy)


# --- average precision


def plain_ap(outputs: tuple[Tensor, Tensor], targets: dict[str, Tensor]) -> float:
    """Greedy matching, image by image, and the area under the monotone precision: as the textbooks say it."""
    logits, sides = outputs
    probability = logits.flatten(2).softmax(1)
    found, truth = beyond._corners(sides), beyond._corners(targets["box"])
    areas = []
    for kind in range(1, beyond.KINDS + 1):
        detections, open_boxes = [], {}
        for n in range(len(logits)):
            labels = targets["class"][n].flatten()
            open_boxes[n] = [truth[n, c].tolist() for c in range(64) if labels[c] == kind]
            for c in range(64):
                if probability[n, 1:, c].argmax() + 1 == kind:
                    detections.append((probability[n, kind, c].item(), n, found[n, c].tolist()))
        total = sum(map(len, open_boxes.values()))
        if not total:
            continue
        hits = []
        for _, n, box in sorted(detections, reverse=True):
            fitting = [b for b in open_boxes[n] if overlap(box, b) > 0.5]
            hits.append(bool(fitting))
            for b in fitting:
                open_boxes[n].remove(b)
        points = [(sum(hits[: i + 1]) / total, sum(hits[: i + 1]) / (i + 1)) for i in range(len(hits))]
        area, before = 0.0, 0.0
        for i, (recall, _) in enumerate(points):
            area += (recall - before) * max(p for _, p in points[i:])
            before = recall
        areas.append(area)
    return sum(areas) / len(areas)


def overlap(a: list[float], b: list[float]) -> float:
    common = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    both = [max(0, x[2] - x[0]) * max(0, x[3] - x[1]) for x in (a, b)]
    return common / (sum(both) - common) if common else 0.0


def detections(noise: float, images: int = 12, seed: int = 0) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Return outputs near the truth, many of them wrong, and the targets, with scores far apart."""
    generator = torch.Generator().manual_seed(seed)
    grids = [beyond.grid_target(c) for c in beyond.canvases(images, 1)[0]]
    targets = {key: torch.stack([g[key] for g in grids]) for key in ("class", "box")}
    sides = targets["box"] + noise * torch.randn(targets["box"].shape, generator=generator)
    # a neighbour proposes the same digit's box too
    sides[..., 1:] = torch.where(targets["class"][:, None, :, 1:] > 0, sides[..., 1:], sides[..., :-1])
    logits = 3 * torch.randn(images, beyond.KINDS + 1, 8, 8, generator=generator)
    hot = torch.nn.functional.one_hot(targets["class"], beyond.KINDS + 1).permute(0, 3, 1, 2).float()
    logits += 6 * hot
    logits[..., 1:] += 3 * hot[..., :-1]
    return (logits, sides), targets


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_average_precision_is_the_plain_one(noise: float) -> None:
    task = beyond.Detection()
    outputs, targets = detections(noise)
    exact = plain_ap(outputs, targets)
    assert 0.01 < exact < 0.99
    # scores in one of the 2,000 steps count as tied: a few pairs out of 768 detections change places
    assert task.value(task.metric(outputs, targets)) == pytest.approx(exact, abs=0.003)


def test_average_precision_does_not_depend_on_the_cut_into_batches() -> None:
    task = beyond.Detection()
    outputs, targets = detections(0.2)
    whole = task.metric(outputs, targets)
    parts = [slice(0, 1), slice(1, 8), slice(8, 12)]
    cut = [task.metric(tuple(o[p] for o in outputs), {k: v[p] for k, v in targets.items()}) for p in parts]
    assert torch.equal(whole, sum(cut))


def test_average_precision_of_the_truth_is_one_and_of_nothing_zero() -> None:
    task = beyond.Detection()
    (_, _), targets = detections(0.0)
    right = 40 * torch.nn.functional.one_hot(targets["class"], beyond.KINDS + 1).permute(0, 3, 1, 2).float()
    assert task.value(task.metric((right, targets["box"]), targets)) == pytest.approx(1, abs=1e-12)
    assert task.value(task.metric((right, targets["box"] - 10), targets)) == 0
    assert task.loss((right, targets["box"]), targets) < 1e-6


# --- the ordinary path


@pytest.mark.parametrize(
    ("name", "data", "distilled"), [("segmentation", "small_masks", True), ("detection", "small_grids", False)]
)
def test_pruned_within_the_budget(tmp_path: Path, name: str, data: str, distilled: bool) -> None:
    config = dataclasses.replace(
        beyond.RUNS[name],
        data=f"{__file__}:{data}",
        model_arg=("width=4",),
        train=TrainConfig(dense=1, prune=4, tune=1, batch=24, threads=1, **CPU),
    )
    progress = Notes()
    result = prune(config, tmp_path / "run", progress=progress)
    assert result["budget"]["within"]
    assert result["sliced"]["volume"] <= result["dense"]["volume"] / 4
    assert result["parity"]["masked_vs_sliced"] <= 1e-9
    assert result["metric"]["name"] == ("mean IoU" if name == "segmentation" else "AP50")
    assert result["input"]["classes"] == ["background", *map(str, range(beyond.KINDS))]
    said = [note for note in progress.notes if "distillation" in note]
    assert [note.split()[0] for note in said] == ([] if distilled else ["prune", "tune"])
    network, task = Network.load(tmp_path / "run" / "network"), load_task(config.task)
    source = load_data(config.data)
    assert isinstance(task, Distills) is distilled
    values = {batch: evaluate(network, source.test, task, batch=batch, **CPU) for batch in (5, 16)}
    assert values[5] == pytest.approx(values[16], abs=1e-12)
    assert values[16] == pytest.approx(result["sliced"]["metric"], abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", beyond.RUNS)
def test_pruned_networks_keep_what_they_learnt(tmp_path: Path, name: str) -> None:
    figures = beyond.figures(beyond.RUNS[name], tmp_path / "run")
    assert figures["within"] and figures["volume_factor"] >= 4
    assert figures["dense"] > 0.6 and figures["drop_points"] <= 3


# --- data whose targets are masks or structures

USER = """
    import torch
    from PIL import Image
    def item(i, kind):
        image = torch.full((1, 8, 8), i, dtype=torch.uint8)
        if kind == "pair": return image, (i % 3, torch.full((2, 4), i / 2))
        if kind == "dict": return image, {"number": i % 3, "inner": [torch.tensor(i), torch.zeros(8, 8)]}
        if kind == "box": return image, (i, i, i + 1.5, i + 2)
        if kind == "ragged": return image, {"boxes": torch.zeros(i % 2 + 1, 4)}
        if kind == "other": return image, ({"a": 1} if i % 2 else {"b": 1})
        if kind == "sizes": return torch.zeros(1, 8 + i % 2, 8, dtype=torch.uint8), torch.zeros(8, 8)
    def data(kind): return [item(i, kind) for i in range(20)], [item(i, kind) for i in range(6)]
    def pair(): return data("pair")
    def dict_(): return data("dict")
    def box(): return data("box")
    def ragged(): return data("ragged")
    def other(): return data("other")
    def sizes(): return data("sizes")
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_targets.py").write_text(textwrap.dedent(USER), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "own_targets.py")


def batches(split: Split, **options: Any) -> list[tuple[Tensor, Any]]:
    defaults = {"batch": 7, "train": True, "seed": 0, "epoch": 0, "device": "cpu"}
    return list(split.batches(**defaults | options))


def levels(images: Tensor, source: DataSource) -> Tensor:
    return (images[:, 0, 0, 0] * source.std[0] + source.mean[0]).mul(255).round()


@pytest.mark.parametrize("limit", [2**30, 0])
def test_structured_targets_stay_with_their_images(user: str, limit: int) -> None:
    source = load_data(f"{user}:pair", memory_limit_bytes=limit, workers=0)
    assert source.classes == () and len(source.fit) + len(source.held_out) == 20
    for images, (kinds, boxes) in batches(source.fit) + batches(source.test, train=False):
        assert kinds.dtype == torch.int64 and boxes.shape[1:] == (2, 4)
        assert torch.equal(levels(images, source) % 3, kinds.float())
        assert torch.equal(levels(images, source) / 2, boxes[:, 1, 2])
    nested = load_data(f"{user}:dict_", memory_limit_bytes=limit, workers=0)
    ((images, targets),) = batches(nested.test, train=False)
    assert targets["inner"][0].tolist() == levels(images, nested).tolist() == [0, 1, 2, 3, 4, 5]
    assert targets["inner"][1].shape == (6, 8, 8) and targets["number"].tolist() == [0, 1, 2, 0, 1, 2]


def test_a_tuple_of_numbers_is_one_vector(user: str) -> None:
    ((_, boxes),) = batches(load_data(f"{user}:box").test, train=False)
    assert boxes[3].tolist() == [3, 3, 4.5, 5]


@pytest.mark.parametrize("name", ["ragged", "other"])
def test_targets_that_do_not_stack(user: str, name: str) -> None:
    with pytest.raises(InputError, match="one shape and structure"):
        load_data(f"{user}:{name}")


def test_masks_refuse_images_that_would_be_resized(user: str) -> None:
    for options in ({}, {"size": 4}):
        with pytest.raises(InputError, match="no longer fit"):
            load_data(f"{user}:sizes", **options)


@pytest.mark.parametrize("limit", [2**30, 0])
def test_augmentation_that_structures_cannot_follow_is_refused(user: str, limit: int) -> None:
    source = load_data(f"{user}:pair", memory_limit_bytes=limit, workers=0)
    assert batches(source.fit, augment="auto") and batches(source.fit, augment="none")
    with pytest.raises(InputError, match="moved images too"):
        batches(source.fit, augment="flip")
    # only training moves anything
    assert batches(source.held_out, train=False, augment="flip")


@pytest.mark.parametrize("augment", ["crop", "flip", "crop,flip"])
def test_masks_move_with_their_images(augment: str) -> None:
    masks = torch.randint(1, 200, (12, 16, 24), generator=torch.Generator().manual_seed(0))
    images = masks[:, None].to(torch.uint8)
    split = MemorySplit(
        pixels=Pixels(images, masks), indices=torch.arange(12), mean=(0.0,), std=(1.0,), automatic=()
    )  # fmt: skip
    ((still, _),) = batches(split, batch=12)
    ((moved, followed),) = batches(split, batch=12, augment=augment)
    grey = (moved[:, 0] * 255).round().long()
    assert not torch.equal(moved, still)
    # where the image was padded with 0, the mask belongs to no class
    assert torch.equal(grey == 0, followed == UNLABELLED)
    assert torch.equal(grey[grey > 0], followed[grey > 0])
    assert (followed == UNLABELLED).any() == ("crop" in augment)


@pytest.mark.parametrize("targets", [torch.zeros(2, 8, 8), torch.zeros(2, 4, 4).long(), (torch.zeros(2),)])
def test_only_masks_of_the_images_size_move(targets: Tensor | tuple[Tensor]) -> None:
    images, corner = torch.zeros(2, 1, 8, 8), torch.zeros(2).long()
    with pytest.raises(InputError, match="flip"):
        move(images, targets, corner, corner, corner, ("flip",))
    assert move(images, targets, corner, corner, corner, ())[1] is targets


def test_several_heads_and_no_distillation_loss_of_ones_own() -> None:
    network = beyond.Detector(5, width=4)
    pruner = BAR(network, torch.zeros(2, 1, 32, 32), budget="2x", steps=3, teacher=network, distill=DistillConfig())
    images = torch.randn(2, 1, 32, 32)
    outputs = pruner.network(images)
    with pytest.raises(InputError, match="outputs that are a tuple"):
        pruner.loss(outputs[0].mean(), images, outputs)


def test_a_run_without_distillation_says_nothing_where_none_was_asked_for(tmp_path: Path) -> None:
    config = dataclasses.replace(
        beyond.RUNS["detection"],
        data=f"{__file__}:small_grids",
        model_arg=("width=4",),
        distill=DistillConfig(alpha=0.0),
        train=TrainConfig(dense=0, prune=2, tune=0, batch=40, threads=1, **CPU),
    )
    progress = Notes()
    prune(config, tmp_path / "run", progress=progress)
    assert not [note for note in progress.notes if "distillation" in note]
