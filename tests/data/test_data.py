"""Data sources of every form, batches that (seed, epoch) determine, and augmentation seen pixel by pixel."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from bar_edge.data import DataSource, Split, load_data
from bar_edge.data.augment import Draws, crop_and_flip, normalise, padding
from bar_edge.data.memory import MemorySplit
from bar_edge.data.source import channel_statistics, generator, stratified
from bar_edge.data.stream import StreamSplit
from bar_edge.errors import EnvironmentLacks, InputError

CIFAR10 = Path(os.environ.get("BAR_EDGE_CIFAR10", Path(__file__).parents[3] / "shared/data/cifar10"))
COLOURS = ("red", "green", "blue")


# --- images made here


def picture(number: int, size: tuple[int, int] = (16, 12), mode: str = "RGB") -> Image.Image:
    """Return an image of random pixels that its number determines; size is (width, height)."""
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8))


def encoded(number: int, **arguments: Any) -> bytes:
    buffer = io.BytesIO()
    picture(number, **arguments).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(folder: Path, names: tuple[str, ...] = COLOURS, column: str = "image", label: str = "label") -> None:
    """Write 60 training and 12 test images; label i % 3; the training split in two files."""
    metadata = {"huggingface": json.dumps({"info": {"features": {label: {"names": list(names)}}}})} if names else None
    for file, numbers in {
        "train-00000-of-00002.parquet": range(30),
        "train-00001-of-00002.parquet": range(30, 60),
        "test-00000-of-00001.parquet": range(100, 112),
    }.items():
        images = [{"bytes": encoded(n), "path": f"{n}.png"} for n in numbers]
        table = pa.table({column: images, label: [n % 3 for n in numbers]})
        pq.write_table(table.replace_schema_metadata(metadata), folder / file)


def write_class_folders(
    folder: Path, test: str = "test", size: Callable[[int], tuple[int, int]] = lambda _n: (16, 12), mode: str = "RGB"
) -> None:
    """Write 60 training and 12 test images; class i % 3."""
    for split, numbers in {"train": range(60), test: range(100, 112)}.items():
        for name in COLOURS:
            (folder / split / name).mkdir(parents=True)
        for n in numbers:
            picture(n, size(n), mode).save(folder / split / COLOURS[n % 3] / f"{n:03}.png")


def write_cifar_python(folder: Path) -> Tensor:
    """Write two batches of 20 images and a test batch of 10, as Python 2 did; return the training pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 3072), dtype=np.uint8)
    parts = {"data_batch_1": slice(0, 20), "data_batch_2": slice(20, 40), "test_batch": slice(40, 50)}
    for file, part in parts.items():
        batch = {b"data": pixels[part], b"labels": [n % 2 for n in range(50)][part], b"batch_label": b"x"}
        (folder / file).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"cat", b"dog"]}, protocol=2))
    return torch.from_numpy(pixels[:40]).view(40, 3, 32, 32)


def everything(split: Split, batch: int = 7, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Return all (images, targets) of one pass."""
    arguments = {"train": False, "seed": 0, "epoch": 0, "device": "cpu", **arguments}
    images, targets = zip(*split.batches(batch, **arguments), strict=True)
    return torch.cat(images), torch.cat(targets)


def pixels_of(images: Tensor, source: DataSource) -> Tensor:
    """Undo the normalisation."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (source.mean, source.std))
    restored = (images * std + mean) * 255
    # float32 rounding of values up to 255 stays far below half a grey level
    assert torch.allclose(restored, restored.round(), atol=1e-2)
    return restored.round().to(torch.uint8)


def expected(numbers: range, **arguments: Any) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(picture(n, **arguments))).permute(2, 0, 1) for n in numbers])


@pytest.fixture(scope="module")
def digits() -> DataSource:
    return load_data("digits")


# --- splits


def test_digits(digits: DataSource) -> None:
    assert (digits.name, digits.input_shape) == ("digits", (1, 8, 8))
    assert digits.classes == tuple("0123456789")
    assert len(digits.fit) + len(digits.held_out) + len(digits.test) == 1797
    assert abs(len(digits.test) - 0.2 * 1797) <= 5 >= abs(len(digits.held_out) - 0.1 * len(digits.fit) / 0.9)
    images, targets = everything(digits.fit)
    held_out, _ = everything(digits.held_out)
    training = pixels_of(torch.cat([images, held_out]), digits)
    assert (training.min().item(), training.max().item()) == (0, 255)
    assert targets.dtype == torch.int64
    normalised = torch.cat([images, held_out]).double()
    assert normalised.mean().item() == pytest.approx(0, abs=1e-5)
    assert normalised.std().item() == pytest.approx(1, abs=1e-4)


def test_held_out_is_seeded_and_the_test_split_is_fixed(digits: DataSource) -> None:
    other, again = load_data("digits", seed=1), load_data("digits")
    assert torch.equal(everything(digits.held_out)[0], everything(again.held_out)[0])
    assert not torch.equal(everything(digits.held_out)[0], everything(other.held_out)[0])
    # normalisation differs by nothing either: it is that of the whole training split
    assert torch.equal(everything(digits.test)[0], everything(other.test)[0])


def test_stratified_is_a_partition_with_equal_shares() -> None:
    labels = torch.tensor([0] * 100 + [1] * 40 + [2] * 3 + [3])
    rest, chosen = stratified(labels, 0.1, seed=3)
    assert sorted([*rest.tolist(), *chosen.tolist()]) == list(range(len(labels)))
    assert labels[chosen].bincount(minlength=4).tolist() == [10, 4, 1, 0]
    assert chosen.tolist() == sorted(chosen.tolist())


def test_all_bits_of_every_seed_count() -> None:
    # torch's own CPU generator ignores all but the low 32 bits
    draws = [torch.rand(3, generator=generator(*seeds)) for seeds in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 1, 0)]]
    assert all(not torch.equal(a, b) for n, a in enumerate(draws) for b in draws[:n])


def test_channel_statistics() -> None:
    pixels = torch.randint(0, 256, (150, 3, 5, 4), dtype=torch.uint8)
    pixels[:, 2] = 51
    mean, std = channel_statistics(pixels)
    scaled = pixels.double() / 255
    assert mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert std[:2] == pytest.approx(scaled[:, :2].std((0, 2, 3), correction=0).tolist(), abs=1e-12)
    assert std[2] == 1


@pytest.mark.parametrize(("batch", "train", "batches", "images"), [
    (100, False, 2, 143), (143, False, 1, 143), (100, True, 1, 100), (143, True, 1, 143), (500, True, 1, 143),
])  # fmt: skip
def test_number_of_batches(digits: DataSource, batch: int, train: bool, batches: int, images: int) -> None:
    sizes = [len(x) for x, _ in digits.held_out.batches(batch, train=train, seed=0, epoch=0, device="cpu")]
    assert (len(sizes), sum(sizes)) == (batches, images)
    assert digits.held_out.n_batches(batch, drop_last=train) == batches


def test_batches_depend_on_seed_and_epoch_alone(digits: DataSource) -> None:
    def run(seed: int, epoch: int) -> Tensor:
        return everything(digits.fit, 128, train=True, seed=seed, epoch=epoch)[0]

    first = run(5, 2)
    torch.rand(3)
    run(5, 3)
    before = torch.get_rng_state()
    assert torch.equal(first, run(5, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first, run(5, 3))
    assert not torch.equal(first, run(6, 2))


def test_shuffle_covers_each_image_once_with_its_target(digits: DataSource) -> None:
    plain, targets = everything(digits.held_out)
    shuffled, shuffled_targets = everything(digits.held_out, 143, train=True, augment="none")
    position = [(plain == image).flatten(1).all(1).nonzero()[:, 0].tolist() for image in shuffled]
    # every image of this split is unique
    assert sorted(p for (p,) in position) == list(range(len(plain)))
    assert position != sorted(position)
    assert torch.equal(shuffled_targets, targets[torch.tensor(position)[:, 0]])


def test_unknown_augmentation(digits: DataSource) -> None:
    with pytest.raises(InputError, match="crop, flip"):
        everything(digits.fit, train=True, augment="crop,rotate")


# --- augmentation


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("names", [("crop",), ("flip",), ("crop", "flip"), ()])
def test_augmentation_moves_pixels_and_pads_with_zeros(channels: int, names: tuple[str, ...]) -> None:
    n, height, width = 200, 16, 12
    images = torch.randint(1, 256, (n, channels, height, width), dtype=torch.uint8)
    draws = Draws.of(n, height, seed=0, epoch=0)
    result = crop_and_flip(images, draws.rows, draws.columns, draws.flip, names)
    pad = padding(height)
    for i in range(n):
        padded = torch.nn.functional.pad(images[i], (pad,) * 4)
        top, left = (int(draws.rows[i]), int(draws.columns[i])) if "crop" in names else (pad, pad)
        cropped = padded[:, top : top + height, left : left + width]
        assert torch.equal(result[i], cropped.flip(2) if "flip" in names and draws.flip[i] else cropped)


def test_draws_cover_all_offsets_evenly() -> None:
    draws = Draws.of(9000, 32, seed=1, epoch=0)
    for offsets in (draws.rows, draws.columns):
        counts = offsets.bincount()
        # 9 offsets, 1,000 each; the deviation of a count is 30
        assert len(counts) == 9
        assert (counts - 1000).abs().max() < 150
    assert abs(draws.flip.float().mean() - 0.5) < 0.03
    assert [padding(h) for h in (4, 8, 32, 224)] == [1, 1, 4, 28]


def test_normalise_and_layout() -> None:
    images = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    mean, std = (0.5, 0.25, 0.1), (0.2, 0.3, 0.4)
    result = normalise(images, mean, std)
    reference = (images.double() / 255 - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    # values up to 10 in float32
    assert torch.allclose(result.double(), reference, atol=1e-5)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert result.dtype == torch.float32


def test_digits_are_never_mirrored_and_photographs_are(digits: DataSource, tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    photographs = load_data(str(tmp_path))
    for source, names in ((digits, ("crop",)), (photographs, ("crop", "flip"))):
        assert isinstance(source.fit, MemorySplit)
        assert source.fit.automatic == names
        explicit = everything(source.fit, 16, train=True, augment=",".join(names))[0]
        assert torch.equal(everything(source.fit, 16, train=True)[0], explicit)
        assert not torch.equal(everything(source.fit, 16, train=True, augment="none")[0], explicit)


# --- folders


@pytest.mark.parametrize(("column", "label"), [("image", "label"), ("img", "fine_label"), ("img", "labels")])
@pytest.mark.parametrize("sub", ["", "data"])
def test_parquet_round_trip(tmp_path: Path, column: str, label: str, sub: str) -> None:
    (tmp_path / sub).mkdir(exist_ok=True)
    write_parquet(tmp_path / sub, column=column, label=label)
    source = load_data(str(tmp_path))
    assert (source.name, source.input_shape, source.classes) == (tmp_path.name, (3, 12, 16), COLOURS)
    images, targets = everything(source.test)
    assert torch.equal(pixels_of(images, source), expected(range(100, 112)))
    assert targets.tolist() == [n % 3 for n in range(100, 112)]
    assert (len(source.fit), len(source.held_out)) == (54, 6)
    assert everything(source.held_out)[1].bincount().tolist() == [2, 2, 2]


def test_parquet_without_names_numbers_its_classes(tmp_path: Path) -> None:
    write_parquet(tmp_path, names=())
    assert load_data(str(tmp_path)).classes == ("0", "1", "2")


@pytest.mark.parametrize("test", ["test", "val"])
def test_class_folders(tmp_path: Path, test: str) -> None:
    write_class_folders(tmp_path, test)
    source = load_data(str(tmp_path))
    images, targets = everything(source.test)
    order = sorted(range(100, 112), key=lambda n: (sorted(COLOURS).index(COLOURS[n % 3]), n))
    assert source.classes == tuple(sorted(COLOURS))
    assert torch.equal(pixels_of(images, source), torch.cat([expected(range(n, n + 1)) for n in order]))
    assert [source.classes[t] for t in targets] == [COLOURS[n % 3] for n in order]


def test_grey_images_keep_one_channel_unless_one_has_colours(tmp_path: Path) -> None:
    write_class_folders(tmp_path, mode="L")
    source = load_data(str(tmp_path))
    assert source.input_shape == (1, 12, 16)
    assert isinstance(source.fit, MemorySplit)
    assert source.fit.automatic == ("crop",)
    picture(7).save(tmp_path / "test/blue/colour.png")
    assert load_data(str(tmp_path)).input_shape == (3, 12, 16)


def test_sixteen_bit_images_are_scaled_not_clipped(tmp_path: Path) -> None:
    write_class_folders(tmp_path, mode="L")
    values = np.array([[0, 256, 32768, 65535] * 4] * 12, dtype=np.uint16)
    for path in (tmp_path / "test").rglob("*.png"):
        Image.fromarray(values).save(path)
    source = load_data(str(tmp_path))
    images, _ = everything(source.test)
    assert pixels_of(images, source)[0, 0, 0, :4].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(
    ("white", "kind", "size"),
    [(1.0, "float32", "F"), (0.7, "float32", "F"), (200.0, "float32", "F"), (1023, "uint16", "I;16")]
    + [(4095, "uint16", "I;16"), (255, "uint16", "I;16"), (16000, "uint16", "I;16"), (65535, "uint16", "I;16")],
)
def test_more_than_eight_bits_and_floats_are_scaled_by_their_range(
    tmp_path: Path, white: float, kind: str, size: str
) -> None:
    """Float TIFFs in [0, 1] became all 0, 12-bit images kept 16 levels."""
    for split, number in (("train", 10), ("test", 4)):
        for name in COLOURS:
            (tmp_path / split / name).mkdir(parents=True)
            for n in range(number):
                values = np.random.default_rng(n).random((12, 16)) * white
                values[0, :2] = (0, white)
                file = tmp_path / split / name / f"{n}.{'tiff' if size == 'F' else 'png'}"
                Image.fromarray(values.astype(kind)).save(file)
    source = load_data(str(tmp_path))
    levels = pixels_of(everything(source.fit)[0], source).unique()
    assert len(levels) > 150 and int(levels.min()) == 0 and int(levels.max()) > 170
    assert source.input_shape == (1, 12, 16)


@pytest.mark.parametrize("values", [(-1.0, 1.0), (0.0, 1000.0), (0.0, float("nan"))])
def test_floats_of_another_range_are_refused(tmp_path: Path, values: tuple[float, float]) -> None:
    write_class_folders(tmp_path)
    Image.fromarray(np.tile(np.array(values, np.float32), (12, 8))).save(tmp_path / "train" / "red" / "000.tiff")
    with pytest.raises(InputError, match="000.tiff"):
        load_data(str(tmp_path), memory_limit_bytes=0)


def test_a_channel_without_variance_is_refused(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    for file in tmp_path.rglob("*.png"):
        pixels = np.array(Image.open(file))
        pixels[:, :, 1] = 7
        Image.fromarray(pixels).save(file)
    with pytest.raises(InputError, match="channel 1 is the same"):
        load_data(str(tmp_path))


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", ".git", "__MACOSX"])
def test_hidden_folders_are_no_classes(tmp_path: Path, hidden: str) -> None:
    write_class_folders(tmp_path)
    before = load_data(str(tmp_path))
    for folder in (tmp_path / "train", tmp_path / "test", tmp_path / "train" / "red"):
        (folder / hidden).mkdir()
        picture(0).save(folder / hidden / "000.png")
    found = load_data(str(tmp_path))
    assert found.classes == before.classes and len(found.fit) == len(before.fit)
    assert f"train/{hidden}/ is no class" in " ".join(found.notes) and not before.notes


def test_an_empty_folder_of_a_class_is_named(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    (tmp_path / "train" / "violet").mkdir()
    with pytest.raises(InputError, match="none in violet"):
        load_data(str(tmp_path))


def test_what_is_not_read_is_counted_and_named(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    for name in ("a.avif", "b.avif", "c.heic"):
        (tmp_path / "train" / "red" / name).write_bytes(b"")
    assert "2 .avif, 1 .heic" in load_data(str(tmp_path)).notes[0]


@pytest.mark.parametrize("suffix", [".gif", ".jfif"])
def test_other_names_of_known_formats_are_read(tmp_path: Path, suffix: str) -> None:
    write_class_folders(tmp_path)
    before = len(load_data(str(tmp_path)).fit)
    for n in range(20):
        picture(n).save(tmp_path / "train" / "red" / f"more{n}{suffix}", "JPEG" if suffix == ".jfif" else "GIF")
    assert len(load_data(str(tmp_path)).fit) == before + 18


@pytest.mark.parametrize("channels", [2, 4, 5, 12])
def test_images_of_any_number_of_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    (tmp_path / "layers.py").write_text(
        f"""import torch
class Data:
    classes = ("a", "b")
    def __len__(self): return 40
    def __getitem__(self, i):
        return torch.randint(0, 256, ({channels}, 6, 8), dtype=torch.uint8,
                             generator=torch.Generator().manual_seed(i)), i % 2
def both(): return Data(), Data()
"""
    )
    monkeypatch.chdir(tmp_path)
    source = load_data("layers.py:both")
    assert source.input_shape == (channels, 6, 8)
    item = torch.randint(0, 256, (channels, 6, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pixels_of(everything(source.test)[0], source)[0], item)
    assert isinstance(load_data("layers.py:both", memory_limit_bytes=0).fit, StreamSplit)


def test_one_image_per_class_holds_none_out(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for n, name in enumerate(COLOURS):
            (tmp_path / split / name).mkdir(parents=True)
            picture(n).save(tmp_path / split / name / "0.png")
    with pytest.raises(InputError, match="held-out"):
        load_data(str(tmp_path))


def test_fit_and_held_out_share_one_tensor(tmp_path: Path) -> None:
    write_parquet(tmp_path)
    source = load_data(str(tmp_path))
    assert isinstance(source.fit, MemorySplit)
    assert isinstance(source.held_out, MemorySplit)
    assert source.fit.pixels is source.held_out.pixels
    assert source.fit.pixels.images.dtype == torch.uint8
    assert set(source.fit.indices.tolist()).isdisjoint(source.held_out.indices.tolist())


def test_cifar_python_files(tmp_path: Path) -> None:
    pixels = write_cifar_python(tmp_path)
    source = load_data(str(tmp_path))
    assert (source.input_shape, source.classes, len(source.test)) == ((3, 32, 32), ("cat", "dog"), 10)
    assert isinstance(source.fit, MemorySplit)
    assert torch.equal(source.fit.pixels.images, pixels)
    images, targets = everything(source.fit)
    assert torch.equal(pixels_of(images, source), pixels[source.fit.indices])
    assert torch.equal(targets, source.fit.indices % 2)


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_malicious_cifar_pickle_is_refused(tmp_path: Path) -> None:
    write_cifar_python(tmp_path)
    marker = tmp_path / "was_run"
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps({b"data": Malicious(marker)}, protocol=2))
    with pytest.raises(InputError, match=r"data_batch_2.*mkdir"):
        load_data(str(tmp_path))
    assert not marker.exists()


@pytest.mark.parametrize(
    "batch",
    [
        b"no pickle",
        pickle.dumps({b"data": np.zeros((20, 3072), np.float32), b"labels": [0] * 20}, protocol=2),
        pickle.dumps({b"data": np.zeros((20, 100), np.uint8), b"labels": [0] * 20}, protocol=2),
        pickle.dumps({b"data": np.zeros((20, 3072), np.uint8), b"labels": [0] * 3}, protocol=2),
        pickle.dumps({b"data": np.array([{}] * 4, dtype=object), b"labels": [0] * 4}, protocol=2),
        pickle.dumps([1, 2], protocol=2),
    ],
)
def test_broken_cifar_files(tmp_path: Path, batch: bytes) -> None:
    write_cifar_python(tmp_path)
    (tmp_path / "data_batch_2").write_bytes(batch)
    with pytest.raises(InputError, match="data_batch_2"):
        load_data(str(tmp_path))


# --- streams


def test_images_of_many_sizes_stream(tmp_path: Path) -> None:
    write_class_folders(tmp_path, size=lambda n: (40 + n % 7, 36 + n % 5))
    assert load_data(str(tmp_path), workers=0).input_shape == (3, 224, 224)
    source = load_data(str(tmp_path), size=None, memory_limit_bytes=0, workers=0)
    assert isinstance(source.fit, StreamSplit)
    in_memory = load_data(str(tmp_path), size=24)
    streamed = load_data(str(tmp_path), size=24, memory_limit_bytes=0)
    assert isinstance(in_memory.fit, MemorySplit)
    assert isinstance(streamed.fit, StreamSplit)
    assert streamed.input_shape == in_memory.input_shape == (3, 24, 24)
    # without augmentation both are the same centre crop
    for a, b in zip(everything(streamed.test), everything(in_memory.test), strict=True):
        assert torch.equal(a, b)


def test_stream_of_equal_images_is_what_memory_gives(tmp_path: Path) -> None:
    write_parquet(tmp_path)
    memory, stream = load_data(str(tmp_path)), load_data(str(tmp_path), memory_limit_bytes=0, workers=2)
    assert isinstance(stream.fit, StreamSplit)
    assert (stream.mean, stream.std, len(stream.held_out)) == (memory.mean, memory.std, len(memory.held_out))
    for epoch in range(2):
        a = everything(memory.fit, 8, train=True, epoch=epoch)
        b = everything(stream.fit, 8, train=True, epoch=epoch)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_random_crops_of_a_stream_depend_on_seed_and_epoch_alone(tmp_path: Path) -> None:
    write_class_folders(tmp_path, size=lambda n: (60 + n % 7, 36))
    source = load_data(str(tmp_path), size=24, memory_limit_bytes=0)

    def run(epoch: int, augment: str = "auto") -> Tensor:
        return everything(source.fit, 18, train=True, seed=4, epoch=epoch, augment=augment)[0]

    before = torch.get_rng_state()
    first = run(0)
    assert torch.equal(first, run(0))
    assert torch.equal(before, torch.get_rng_state())
    centre = run(0, augment="none")
    same = (first == centre).flatten(1).all(1)
    # 4 vertical and about 20 horizontal positions, mirrored or not
    assert same.float().mean() < 0.2
    assert first.shape == centre.shape == (54, 3, 24, 24)
    assert not torch.equal(first, run(1))


# --- the user's own


USER = """
    import torch
    from PIL import Image
    class Data:
        def __init__(self, n, kind): self.n, self.kind = n, kind
        def __len__(self): return self.n
        def __getitem__(self, i):
            if i >= self.n: raise IndexError(i)
            image = torch.full((3, 8, 8), i * 2, dtype=torch.uint8)
            if self.kind == "float": image = image / 255
            if self.kind == "normalised": image = image / 255 - 1
            if self.kind == "pil": image = Image.fromarray(image.permute(1, 2, 0).numpy())
            if self.kind == "bands": image = torch.zeros(5, 8, 8)
            return image, torch.full((8, 8), i % 2) if self.kind == "masks" else i % 4
    def tensors(): return Data(40, "uint8"), Data(8, "uint8")
    def floats(): return Data(40, "float"), Data(8, "float")
    def pil(): return Data(40, "pil"), Data(8, "pil")
    def masks(): return Data(40, "masks"), Data(8, "masks")
    def normalised(): return Data(40, "normalised"), Data(8, "normalised")
    def bands(): return Data(40, "bands"), Data(8, "bands")
    def one(): return Data(40, "pil")
    def empty(): return Data(40, "pil"), Data(0, "pil")
    def broken(): return [("no image", 0)] * 4, [("no image", 0)] * 4
    def unequal(): return [(torch.zeros(3, 8, 8), torch.zeros(n)) for n in (1, 2)], Data(8, "pil")
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_data.py").write_text(textwrap.dedent(USER), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    # load_data makes the working directory importable; undone after the test
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["tensors", "floats", "pil"])
def test_factory_of_the_user(user: Path, name: str) -> None:
    source = load_data(f"{user}/own_data.py:{name}")
    images, targets = everything(source.test)
    assert source.name == f"own_data.py:{name}"
    assert (source.input_shape, source.classes) == ((3, 8, 8), ("0", "1", "2", "3"))
    assert pixels_of(images, source)[:, 0, 0, 0].tolist() == [2 * i for i in range(8)]
    assert targets.tolist() == [i % 4 for i in range(8)]


def test_masks_are_targets_and_images_are_then_not_moved(user: Path) -> None:
    source = load_data("own_data.py:masks")
    images, masks = everything(source.fit, 6, train=True)
    assert masks.shape == (36, 8, 8)
    assert source.classes == ("0", "1")
    assert torch.equal(pixels_of(images, source)[:, 0].long() // 2 % 2, masks)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("normalised", "before normalisation"),
        ("bands", "channel 0, 1, 2, 3, 4 is the same"),
        ("one", "two map-style"),
        ("empty", "test split"),
        ("broken", "train, item 0"),
        ("unequal", "one shape"),
    ],
)
def test_bad_factories(user: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_data(f"own_data.py:{name}")


def test_absent_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentLacks, match=r'pip install "bar-edge\[hf\]"'):
        load_data("hf:cifar10")


# --- what can be wrong


@pytest.mark.parametrize("limit", [2**30, 0])
@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_corrupt_image_is_named(tmp_path: Path, limit: int, damage: str) -> None:
    write_class_folders(tmp_path)
    path = tmp_path / "train/green/031.png"
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "text": b"no image", "empty": b""}[damage])
    with pytest.raises(InputError, match=r"train/green/031\.png") as caught:
        everything(load_data(str(tmp_path), memory_limit_bytes=limit).fit)
    assert str(tmp_path) not in str(caught.value)
    assert "remove or replace" in caught.value.remedy


def test_error_of_a_worker_process_keeps_its_fields(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    source = load_data(str(tmp_path), memory_limit_bytes=0, workers=2)
    for path in (tmp_path / "test/green").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match="remove or replace") as caught:
        everything(source.test)
    assert caught.value.got.startswith("test/green/")


@pytest.mark.parametrize("data", [b"broken", None])
def test_corrupt_row_is_named(tmp_path: Path, data: bytes | None) -> None:
    write_parquet(tmp_path)
    images = [{"bytes": encoded(n) if n != 5 else data, "path": ""} for n in range(12)]
    pq.write_table(pa.table({"image": images, "label": [0] * 12}), tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(InputError, match=r"test-00000-of-00001\.parquet, row 5"):
        load_data(str(tmp_path))


@pytest.mark.parametrize(("label", "message"), [(3, "0 to 2"), (-1, "0 to 2"), (None, "0 to 2")])
def test_labels_out_of_range(tmp_path: Path, label: int | None, message: str) -> None:
    write_parquet(tmp_path)
    table = pa.table({"image": [{"bytes": encoded(1)}] * 2, "label": pa.array([0, label], pa.int64())})
    pq.write_table(table, tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(InputError, match=message):
        load_data(str(tmp_path))


def test_unknown_folder_says_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match=r"images/, notes\.txt") as caught:
        load_data(str(tmp_path))
    assert "train/CLASS/" in caught.value.required


@pytest.mark.parametrize("spec", ["no/such/folder", "digit", ""])
def test_unknown_spec(spec: str) -> None:
    with pytest.raises(InputError, match="digits, a folder"):
        load_data(spec)


def test_incomplete_layouts(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "a")
    (tmp_path / "a/test/red").rename(tmp_path / "a/test/mauve")
    with pytest.raises(InputError, match="mauve"):
        load_data(str(tmp_path / "a"))
    (tmp_path / "a/test").rename(tmp_path / "a/other")
    with pytest.raises(InputError, match="test/CLASS/"):
        load_data(str(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    write_parquet(tmp_path / "b", column="picture")
    with pytest.raises(InputError, match="picture"):
        load_data(str(tmp_path / "b"))
    (tmp_path / "b/test-00000-of-00001.parquet").unlink()
    with pytest.raises(InputError, match="validation"):
        load_data(str(tmp_path / "b"))


def test_size_of_decoded_data_is_fixed() -> None:
    with pytest.raises(InputError, match="size 8"):
        load_data("digits", size=32)


@pytest.mark.slow
def test_cifar10_decodes_whole() -> None:
    if not (CIFAR10 / "train.parquet").is_file():
        pytest.skip("no CIFAR-10 folder; set BAR_EDGE_CIFAR10")
    source = load_data(str(CIFAR10))
    assert (source.input_shape, len(source.classes)) == ((3, 32, 32), 10)
    assert (len(source.fit), len(source.held_out), len(source.test)) == (45_000, 5_000, 10_000)
    assert everything(source.held_out, 500)[1].bincount().tolist() == [500] * 10
    # published for the original files: .4914 .4822 .4465, .2470 .2435 .2616; these are JPEG copies
    assert source.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=2e-3)
    assert source.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=3e-3)
