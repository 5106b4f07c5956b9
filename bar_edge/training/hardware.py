"""Where training runs and in which precision."""

from __future__ import annotations

from typing import Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision, Precision

from bar_edge.errors import EnvironmentLacks


def choose_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Return the device that `name` means here; raises EnvironmentLacks if it asks for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise EnvironmentLacks(
            "a CUDA device (device = cuda)",
            got=f"torch {torch.__version__} sees none",
            consequence="nothing was started",
            remedy="use device = auto or cpu, or install a torch with CUDA",
        )
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def choose_precision(name: Literal["auto", "fp32", "bf16"], device: torch.device) -> Literal["fp32", "bf16"]:
    """Return the precision that `name` means on this device: auto is bf16 where it is computed natively."""
    if name != "auto":
        return name
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_computes_bf16()
    return "bf16" if native else "fp32"


def make_fabric(device: torch.device, precision: Literal["fp32", "bf16"]) -> Fabric:
    """Return a Fabric for one device; bf16 means autocast, the weights stay in float32."""
    devices = [device.index or 0] if device.type == "cuda" else 1
    # a plugin instead of its name: by name, Fabric announces it on stderr in every phase
    plugin = MixedPrecision("bf16-mixed", device=device.type) if precision == "bf16" else Precision()
    return Fabric(accelerator=device.type, devices=devices, plugins=[plugin])


def _cpu_computes_bf16() -> bool:
    # oneDNN's own query also says yes where bf16 is emulated with AVX-512, which is slower than float32
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
