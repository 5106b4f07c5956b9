"""All targets: one line each."""

from __future__ import annotations

from bar_edge.errors import EnvironmentLacks, InputError
from bar_edge.targets.onnx.target import ONNX
from bar_edge.targets.openvino import OPENVINO
from bar_edge.targets.row import PRECISIONS, Forms, Target
from bar_edge.targets.tensorrt.target import TRT, TRT_BUNDLE
from bar_edge.targets.torch_source.target import TORCH

TARGETS = {target.name: target for target in (ONNX, OPENVINO, TRT, TRT_BUNDLE, TORCH)}
#: forms for a runtime or a precision that no target names
ELSEWHERE = Forms.of("gather:4", "pointwise:16", "slices", "regular:16", "regular")
_NOTHING = "nothing was written"


def find_target(name: str) -> Target:
    """Return a target; raises InputError for an unknown name."""
    if name not in TARGETS:
        raise InputError(f"a target out of {', '.join(TARGETS)}", got=name, consequence=_NOTHING)
    return TARGETS[name]


def check_target(name: str, precision: str, recipe: str, on: str, max_drop: float | None) -> None:
    """Raise InputError for an unknown name or a useless option, EnvironmentLacks for what cannot be written here.

    recipe: of INT8, or auto. max_drop: asks for a runtime here that computes the file.
    """
    target = find_target(name)
    if precision not in PRECISIONS:
        raise InputError(f"a precision out of {', '.join(PRECISIONS)}", got=precision, consequence=_NOTHING)
    if precision not in target.precisions:
        known = "; ".join(f"{row.name} in {', '.join(row.precisions)}" for row in TARGETS.values())
        raise InputError(f"one of: {known}", got=f"{name} in {precision}", consequence=_NOTHING)
    recipes = ("auto", *(target.recipes if precision == "int8" else ()))
    if recipe not in recipes:
        required = f"--recipe {' or '.join(recipes)}, for {name} in {precision}"
        raise InputError(required, got=recipe, consequence=_NOTHING)
    if on != "local" and not target.on_device:
        built = " or ".join(row.name for row in TARGETS.values() if row.on_device)
        raise InputError(f"--on for --target {built}, which is built on the device", got=f"--target {name}")
    if max_drop is not None and precision in target.unscored:
        raise EnvironmentLacks(
            "a runtime here that computes the file, for --max-drop",
            got=f"{name} in {precision}, which ONNX Runtime has no kernels for",
            consequence=_NOTHING,
            remedy="omit --max-drop, or use fp16",
        )
    if target.needs is not None and on == "local":
        target.needs(precision)


def forms_for(runtime: str, precision: str) -> Forms:
    """Return the forms of the additions that are worth a try on a runtime."""
    rows = (target.forms for target in TARGETS.values() if target.runtime == runtime)
    return next((forms[precision] for forms in rows if precision in forms), ELSEWHERE)


def runtime_of(target: str) -> str | None:
    """Return the runtime here that runs a target's file."""
    return TARGETS[target].runtime if target in TARGETS else None
