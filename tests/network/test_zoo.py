"""Networks as collections have them go through the commands; benchmarks/zoo.py is the same with timm's."""

from pathlib import Path

import pytest

from bar_edge.network import Network
from tests.five_commands import five_commands, torch_flops, write_images
from tests.network import small_zoo

#: least share of the FLOPs that can go
PRUNABLE = {
    "layer_scale": 0.9,
    "tokens": 0.5,
    "weight_standardisation": 0.9,
    "casts": 0.9,
    "frozen_batchnorm": 0.9,
    "shuffle": 0.9,
    "attention": 0.8,
    "cbam": 0.9,
    "names": 0.9,
    "split_attention": 0.9,
}


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("noise"), small_zoo.SHAPE)


@pytest.mark.parametrize("name", PRUNABLE)
def test_a_network_goes_through_the_five_commands(
    name: str, noise: Path, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    spec = f"tests/network/small_zoo.py:{name}"
    done = {d.command: d for d in five_commands(spec, noise, tmp_path, small_zoo.SHAPE)}
    failed = [f"{d.command}: {d.words}" for d in done.values() if d.code]
    assert not failed and list(done) == ["inspect", "prune", "slice", "export", "verify"]
    dense = torch_flops(getattr(small_zoo, name)(3), small_zoo.SHAPE)
    flops = done["inspect"].answer["costs"]["flops"]
    assert flops["full"] == dense["convolutions"] + dense["positions"]
    assert flops["prunable_share"] >= PRUNABLE[name]
    assert done["prune"].answer["budget"]["within"]
    assert done["slice"].answer["parity"]["masked_vs_sliced"] < 1e-12
    sliced = torch_flops(Network.load(tmp_path / "run" / "network"), small_zoo.SHAPE)
    assert sliced["convolutions"] + sliced["positions"] <= 0.55 * flops["full"]
