"""Recipes: how a runtime wants its INT8 files."""

from __future__ import annotations

import dataclasses
import importlib.resources
import tomllib
from typing import Literal, get_args, get_type_hints

from bar_edge.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Where a runtime wants Q/DQ pairs, and what they hold."""

    #: name of the recipe
    name: str
    #: 8 bits of an activation: uint8 with a zero point of its own, or int8 around zero
    activations: Literal["uint8", "int8"]
    #: everywhere: what a layer reads and writes, additions and all that moves values between;
    #: layers: only what a layer reads
    pairs: Literal["everywhere", "layers"]
    #: shared: what is added or concatenated lies on one grid, and is rounded once;
    #: signed: only where no Relu or Clip bounds any of it: every other tensor has a grid of its own
    grids: Literal["signed", "shared"]
    #: shifted: those of large convolutions have a zero point of 1, for the sake of the kernel that takes them
    weights: Literal["symmetric", "shifted"]
    #: 7: integers of -64 to 64, so that two products with eight bits of an activation sum to less than 2**15: x86 CPUs
    #: without VNNI or AMX add them in pairs in 16 bits, and what is more would be cut off; 8: -127 to 127
    weight_bits: Literal[7, 8]
    #: of biases; int32 has the scale of the input times that of the weight; every: float32, and where a convolution
    #: has none, one that changes nothing
    bias: Literal["int32", "float32", "every"]
    #: BatchNorm that folds into no convolution
    batchnorm: Literal["convolution", "float32"]
    #: how ranges are read from histograms unless the accuracy wants another
    ranges: Literal["minmax", "percentile", "entropy", "mse"]


def recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = importlib.resources.files("bar_edge_calibration") / "recipes"
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def load_recipe(name: str) -> Recipe:
    """Return a recipe that comes with the package; raises InputError for an unknown name."""
    if name not in recipes():
        raise InputError(f"an INT8 recipe out of {', '.join(recipes())}", got=repr(name), remedy="name one of these")
    file = importlib.resources.files("bar_edge_calibration") / "recipes" / f"{name}.toml"
    return read_recipe(name, file.read_text(encoding="utf-8"))


def read_recipe(name: str, text: str) -> Recipe:
    """Read a recipe from TOML; raises InputError unless it holds every field of Recipe with a value it knows."""
    try:
        fields = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"TOML in the recipe {name}", got=str(error), remedy="correct the line") from error
    kinds = {field: get_args(kind) for field, kind in get_type_hints(Recipe).items() if field != "name"}
    for field in sorted(kinds.keys() | fields.keys()):
        if field not in kinds or fields.get(field) not in kinds[field]:
            known = (
                f"{field} = one of {', '.join(map(str, kinds[field]))}"
                if field in kinds
                else f"only {', '.join(kinds)}"
            )
            raise InputError(
                f"{known} in the recipe {name}", got=repr(fields.get(field, "nothing")), remedy="correct the recipe"
            )
    return Recipe(name=name, **fields)
