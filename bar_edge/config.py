"""How a run trains and prunes: the tables of a configuration, its presets, and how records are read from TOML."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from bar_edge.errors import InputError

PHASES = ("dense", "prune", "tune")


def at_least(config: Any, least: float, *names: str) -> None:
    """Raise InputError unless these fields are at least so large."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise _wrong(name, f"a number of at least {least:g}", value)


def at_most(config: Any, most: float, *names: str) -> None:
    """Raise InputError unless these fields are at most so large."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value <= most:
            raise _wrong(name, f"a number of at most {most:g}", value)


def above(config: Any, least: float, *names: str) -> None:
    """Raise InputError unless these fields are larger."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > least:
            raise _wrong(name, f"a number above {least:g}", value)


def _wrong(name: str, required: str, value: object) -> InputError:
    return InputError(
        f"{name}: {required}", got=repr(value), consequence="nothing was started", remedy="correct the option"
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How weights are trained; each phase (dense, prune, tune) uses the same fields.

    What is None is chosen by the number of training images (`chosen`).
    """

    #: epochs per phase; chosen: 20, 8 and 24, or as many as 1,500, 600 and 1,800 steps take
    dense: int | None = None
    prune: int | None = None
    tune: int | None = None
    #: images per step; chosen: 128, of few images less, so that an epoch has 100 steps, but 32 at least
    batch: int | None = None
    #: optimiser of the weights (the gates have their own): sgd (Nesterov .9), adamw, or adam (decay in the gradient)
    optimizer: Literal["sgd", "adamw", "adam"] = "sgd"
    #: peak learning rates per phase; chosen: 0.1, 0.02 and 0.05 for a batch of 128, by its root for others
    lr_dense: float | None = None
    lr_prune: float | None = None
    lr_tune: float | None = None
    weight_decay: float = 5e-4
    #: learning-rate schedule: onecycle, cosine or constant; `tune` divides by ten for its last fifth under constant
    schedule: Literal["onecycle", "cosine", "constant"] = "onecycle"
    #: decay of an exponential moving average of the weights, 0 for none
    ema: float = 0.0
    #: auto is bf16 autocast where the device computes bf16 natively, else fp32
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    #: auto (what suits the data set), or a comma list out of crop, flip; none
    augment: str = "auto"
    #: side in pixels to which images are resized and cropped, 0 for their own (224 where they differ)
    image_size: int = 0
    #: processes that decode images, for folders too big for memory
    workers: int = 2
    #: cpu, cuda, or auto
    device: Literal["auto", "cpu", "cuda"] = "auto"
    #: torch threads, 0 for torch's own choice
    threads: int = 0
    #: a checkpoint is written after each epoch, and when the last one is older than this
    checkpoint_minutes: float = 10.0

    def __post_init__(self) -> None:
        """Raise InputError for numbers with which nothing can be trained."""
        at_least(self, 0, "dense", "prune", "tune", "weight_decay", "image_size", "workers", "threads", "ema")
        at_least(self, 1, "batch")
        at_most(self, MOST_THREADS, "threads", "workers")
        above(self, 0, "lr_dense", "lr_prune", "lr_tune", "checkpoint_minutes")

    def chosen(self, images: int) -> TrainConfig:
        """Return the same with what is None chosen for a number of training images."""
        batch = self.batch or next(n for n in (128, 64, 32) if images >= 100 * n or n == 32)
        steps = max(1, images // batch)
        epochs = {name: max(least, -(-total // steps)) for name, (least, total, _) in _SCHEDULE.items()}
        rates = {f"lr_{name}": rate * (batch / 128) ** 0.5 for name, (_, _, rate) in _SCHEDULE.items()}
        found = {"batch": batch, **epochs, **rates}
        return dataclasses.replace(self, **{k: v for k, v in found.items() if getattr(self, k) is None})

    def rate(self, phase: str) -> float:
        """Return the peak learning rate of a phase, once it is chosen."""
        rate: float | None = getattr(self, f"lr_{phase}")
        assert rate is not None, "train() has chosen it"
        return rate


#: phase -> epochs and steps at least, and the peak learning rate for a batch of 128, where they are chosen
_SCHEDULE = {"dense": (20, 1500, 0.1), "prune": (8, 600, 0.02), "tune": (24, 1800, 0.05)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """Knowledge distillation (Lemaire et al. 2019, section 3.5): alpha=0 turns it off."""

    alpha: float = 0.9
    temperature: float = 4.0

    def __post_init__(self) -> None:
        """Raise InputError for a share below 0 or a temperature that is not positive."""
        at_least(self, 0, "alpha")
        above(self, 0, "temperature")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BarConfig:
    """Constants of Budget-Aware Regularization; the defaults are ours, the preset `paper` holds the printed ones."""

    #: lambda * full cost: weight of the sparsity loss, in units of the data loss (31.13 is 1e-5 on WRN-28-12)
    lambda_norm: float = 31.13
    #: lambda per unit of cost, as printed (1e-5 for activations); replaces lambda_norm
    lambda_raw: float | None = None
    #: transition of the budget b(t): sigmoid, linear or exponential
    transition: Literal["sigmoid", "linear", "exponential"] = "sigmoid"
    #: steepness d of the sigmoid or exponential transition
    steepness: float = 10.0
    #: b(0) = (1 + slack) * full cost
    slack: float = 0.01
    #: a = B - margin * full cost
    margin: float = 1e-4
    #: the barrier f is cut off here
    barrier_cap: float = 20.0
    #: how gates move: closing (ours: without noise, the least important per cost first, as b(t) falls) or adam (paper)
    gate_optimizer: Literal["closing", "adam"] = "closing"
    #: adam: learning rate
    gate_lr: float = 1e-3
    #: log alpha stays within plus and minus this
    gate_limit: float = 4.6
    #: where log alpha starts: ranked (0.5 to 3 by the rank of the BatchNorm weights) or uniform (U(0, .01), paper)
    gate_start: Literal["ranked", "uniform"] = "ranked"
    #: the best gate of a protected layer is kept at this log alpha or above
    protect_floor: float = 3.0
    #: which deterministic gate counts as open: louizos or median
    gate_decision: Literal["louizos", "median"] = "louizos"
    #: fold multiplies the kept gate values into the weights, one drops them
    kept_gate: Literal["fold", "one"] = "fold"

    def __post_init__(self) -> None:
        """Raise InputError for constants under which the barrier or the gates cannot work."""
        at_least(self, 0, "slack", "margin", "steepness")
        at_least(self, 4, "gate_limit")
        above(self, 0, "lambda_norm", "barrier_cap", "gate_lr")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MagnitudeConfig:
    """What `--method magnitude` compares."""

    #: mean of the absolute weights of a filter, or root of the mean of their squares
    norm: Literal["l1", "l2"] = "l1"
    #: within each layer, which all shrink by one ratio; or all filters of the network with each other
    scope: Literal["layer", "global"] = "layer"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SlimmingConfig:
    """What `--method slimming` adds to the loss: strength * sum |gamma| (Liu et al. 2017, eq. 1; 1e-4 for VGG)."""

    strength: float = 1e-4

    def __post_init__(self) -> None:
        """Raise InputError for a strength below 0."""
        at_least(self, 0, "strength")


#: what a preset changes in the defaults. paper: Lemaire et al. 2019, section 5.1 and supplement 3, on CIFAR;
#: its constants that are our defaults already (distillation, sigmoid, margin, 1.01 at the start) are not repeated
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "train": {
            "dense": 90,
            "prune": 80,
            "tune": 50,
            "batch": 64,
            "optimizer": "adam",
            "lr_dense": 1e-3,
            "lr_prune": 1e-3,
            "lr_tune": 1e-3,
            "weight_decay": 5e-4,
            "schedule": "constant",
        },
        "bar": {
            "lambda_raw": 1e-5,
            "barrier_cap": 1e10,
            "gate_optimizer": "adam",
            "gate_start": "uniform",
            "protect_floor": 0.0,
        },
    },
}


def overlay(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested data in which the values of `over` win."""
    merged = dict(under)
    for name, value in over.items():
        below = merged.get(name)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[name] = overlay(below, value) if both else value  # type: ignore[arg-type]
    return merged


#: of a runtime or of torch: libraries end the process where the system gives them no more
MOST_THREADS = 1024
_TOML_LIMIT_BYTES = 2**20


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; raises InputError if it is missing, malformed or too large."""
    try:
        with path.open("rb") as file:
            data = file.read(_TOML_LIMIT_BYTES + 1)
        if len(data) > _TOML_LIMIT_BYTES:
            raise ValueError(f"more than {_TOML_LIMIT_BYTES >> 10} KiB")
        return tomllib.loads(data.decode("utf-8-sig").replace("\r\n", "\n"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError("a readable TOML file", got=f"{path.name}: {error}") from error


def to_toml(config: Any) -> str:
    """Write a request as TOML that reads back to an equal record."""
    lines: list[str] = []
    tables: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            given = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
            inner = [f"{name} = {_toml(v)}" for name, v in given if v is not None]
            tables += ["", f"[{field.name}]", *inner]
        elif value is not None:
            lines.append(f"{field.name} = {_toml(value)}")
    return "\n".join(lines + tables) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return repr(value)


def build(kind: type, values: Mapping[str, Any], where: str) -> object:
    """Return a record of nested data; raises InputError for an unknown name or a value of another type."""
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise InputError(
            f"options of {where or 'the run'}: {', '.join(sorted(hints))}",
            got=", ".join(unknown),
            remedy="correct the name",
        )
    return kind(**{name: _value(hints[name], value, f"{where}{name}") for name, value in values.items()})


def _value(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, Mapping):
            return build(hint, value, f"{name}.")
        raise _wrong(name, "a table", value)
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
        raise _wrong(name, " or ".join(map(str, typing.get_args(hint))), value)
    if typing.get_origin(hint) is tuple:
        if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise _wrong(name, "a list of texts", value)
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) in allowed or (value is None and type(None) in allowed):
        return value
    raise _wrong(name, " or ".join(t.__name__ for t in allowed), value)
