"""From a model SPEC to a module: names of the zoo, the user's factories, Hugging Face and timm."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bar_edge.errors import EnvironmentLacks, InputError
from bar_edge.models.mobilenet import mobilenetv2
from bar_edge.models.resnet import cifar_resnet, resnet18, resnet50
from bar_edge.models.vgg import vgg16
from bar_edge.models.wide_resnet import wide_resnet
from bar_edge.user_code import call

Shape = tuple[int, ...]

#: name -> factory(input_shape=, classes=, width=); any wrn-D-K is known besides
ZOO: dict[str, Callable[..., nn.Module]] = {
    "resnet8": functools.partial(cifar_resnet, 8),
    "resnet20": functools.partial(cifar_resnet, 20),
    "resnet32": functools.partial(cifar_resnet, 32),
    "resnet44": functools.partial(cifar_resnet, 44),
    "resnet56": functools.partial(cifar_resnet, 56),
    "resnet110": functools.partial(cifar_resnet, 110),
    "resnet18": resnet18,
    "resnet50": resnet50,
    "vgg16": vgg16,
    "mobilenetv2": mobilenetv2,
    "wrn-28-12": functools.partial(wide_resnet, 28, 12),
}
_WRN = re.compile(r"wrn-(\d+)-(\d+)")


def build(spec: str, *, input_shape: Shape, classes: int, model_args: tuple[str, ...] = ()) -> nn.Module:
    """Build the network that a SPEC names, with fresh weights unless the SPEC's source brings its own.

    spec: a zoo name, `package.module:factory`, `file.py:factory`, `hf:NAME` or `timm:NAME`;
    input_shape: (C, H, W); model_args: `key=value` texts. A factory of the user's gets these
    keywords, and num_classes and input_shape where its signature names them. Raises InputError for
    an unknown name or a bad argument, EnvironmentLacks if an extra is not installed.
    """
    arguments = parse_arguments(model_args)
    source, _, name = spec.partition(":")
    if source in _HUBS:
        return _HUBS[source](name, input_shape, classes, arguments)
    if ":" in spec:
        module = call(spec, arguments, {"num_classes": classes, "input_shape": input_shape})
        if not isinstance(module, nn.Module):
            raise InputError(f"{spec} returns a torch.nn.Module", got=f"a {type(module).__name__}")
        return module
    return _from_zoo(spec, input_shape, classes, arguments)


def check_model(spec: str, model_args: tuple[str, ...] = ()) -> None:
    """Raise InputError unless `build` knows the kind of SPEC, and the name if it is the zoo's; nothing is imported."""
    arguments = parse_arguments(model_args)
    source, _, name = spec.partition(":")
    if (source in _HUBS and not name) or (":" in spec and not spec.rpartition(":")[2]):
        raise InputError(f"a name behind {source}:", got=repr(spec), consequence="nothing was started")
    if source in _HUBS:
        return
    where = spec.rpartition(":")[0]
    if ":" not in spec:
        _zoo_factory(spec, arguments)
    elif where.endswith(".py") and not Path(where).is_file():
        raise InputError(
            "a file with the model's factory", got=f"no file {Path(where).name}", remedy="correct the path"
        )


def parse_arguments(texts: tuple[str, ...]) -> dict[str, int | float | bool | str]:
    """Read `key=value` texts; a value becomes an int, float or bool where it reads as one, else a str."""
    arguments: dict[str, int | float | bool | str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise InputError("a model argument key=value", got=repr(text), remedy="e.g. --model-arg width=0.25")
        arguments[key] = _parse_value(value)
    return arguments


def _parse_value(text: str) -> int | float | bool | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _zoo_factory(name: str, arguments: dict[str, Any]) -> tuple[Callable[..., nn.Module], float]:
    """Return what makes a network of the zoo, and its width; raises InputError for another name or argument."""
    wrn = _WRN.fullmatch(name)
    factory = functools.partial(wide_resnet, int(wrn[1]), int(wrn[2])) if wrn else ZOO.get(name)
    if factory is None:
        close = difflib.get_close_matches(name, ZOO, n=1, cutoff=0.0)
        raise InputError(
            f"a model: {', '.join(ZOO)}, any wrn-D-K, package.module:factory, file.py:factory, hf:NAME, timm:NAME, "
            "or a folder that bar-edge wrote",
            got=repr(name),
            consequence="nothing was started",
            remedy=f"closest name: {close[0]}",
        )
    width = arguments.get("width", 1.0)
    if arguments.keys() - {"width"} or isinstance(width, (bool, str)) or not 0 < width <= 64:
        raise InputError(
            f"{name} takes one argument: width=NUMBER, above 0 and at most 64",
            got=", ".join(f"{key}={value}" for key, value in {"width": width, **arguments}.items()),
        )
    return factory, float(width)


def _from_zoo(name: str, input_shape: Shape, classes: int, arguments: dict[str, Any]) -> nn.Module:
    factory, width = _zoo_factory(name, arguments)
    if len(input_shape) != 3:
        raise InputError(
            f"images CxHxW for {name}", got="x".join(map(str, input_shape)), remedy="--input 3x32x32, or another model"
        )
    return factory(input_shape=input_shape, classes=classes, width=width)


class Logits(nn.Module):
    """A transformers image model that returns its logits as a plain tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, classes)."""
        result: Tensor = self.model(pixel_values=pixel_values).logits
        return result


def _hugging_face(name: str, input_shape: Shape, classes: int, arguments: dict[str, Any]) -> nn.Module:
    try:
        from transformers import AutoModelForImageClassification
    except ImportError as error:
        raise _extra("transformers", "hf") from error
    try:
        model = AutoModelForImageClassification.from_pretrained(
            name, num_labels=classes, ignore_mismatched_sizes=True, use_safetensors=True, **arguments
        )
    except (OSError, ValueError, TypeError) as error:
        raise _hub_error(f"hf:{name}", error) from error
    return Logits(model)


def _timm(name: str, input_shape: Shape, classes: int, arguments: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise _extra("timm", "timm") from error
    try:
        model: nn.Module = timm.create_model(name, num_classes=classes, in_chans=input_shape[0], **arguments)
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise _hub_error(f"timm:{name}", error) from error
    return model


_HUBS: dict[str, Callable[[str, Shape, int, dict[str, Any]], nn.Module]] = {"hf": _hugging_face, "timm": _timm}


def _extra(package: str, extra: str) -> EnvironmentLacks:
    return EnvironmentLacks(
        f"the package {package}", got="it is not installed", remedy=f'pip install "bar-edge[{extra}]"'
    )


def _hub_error(spec: str, error: Exception) -> InputError:
    lines = str(error).strip().splitlines() or [""]
    return InputError(
        f"{spec} names a model that can be loaded",
        got=f"{type(error).__name__}: {lines[0]}",
        remedy="correct the name or the arguments, or check the connection; --debug shows the traceback",
    )
