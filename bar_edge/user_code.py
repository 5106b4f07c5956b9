"""The user's own code: `package.module:name` and `file.py:name`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from bar_edge.errors import BarEdgeError, InputError


def load_attribute(spec: str) -> Any:
    """Import what `package.module:name` or `file.py:name` names; the working directory is importable.

    Raises InputError if the module cannot be imported or has no such name.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise InputError("package.module:name or file.py:name", got=repr(spec))
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = _load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:
        raise InputError(
            f"a module {where} that can be imported from the working directory",
            got=f"{type(error).__name__}: {error}",
            remedy="correct the name, or run from the folder that holds it; --debug shows the traceback",
        ) from error
    if not hasattr(module, name):
        names = [n for n in vars(module) if not n.startswith("_")]
        raise InputError(f"a name in {where}: {', '.join(names)}", got=repr(name), remedy="correct the name")
    return getattr(module, name)


def _load_file(path: Path) -> ModuleType:
    # a prefix of our own, so that a file named like an installed package replaces nothing
    name, path = f"bar_edge_user_{path.stem}", path.resolve()
    loaded = sys.modules.get(name)
    # student and teacher come from one copy of the user's classes
    if loaded is not None and loaded.__file__ == str(path):
        return loaded
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no file {path.name}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def call(spec: str, arguments: Mapping[str, Any], offered: Mapping[str, Any]) -> Any:
    """Call the factory that `spec` names with the user's arguments.

    offered: passed too, but only where the signature names them and the user did not. Raises
    InputError if the signature refuses the arguments or the factory fails.
    """
    factory: Callable[..., Any] = load_attribute(spec)
    if not callable(factory):
        raise InputError(f"{spec} can be called", got=f"a {type(factory).__name__}")
    signature = inspect.signature(factory)
    wanted = {name: value for name, value in offered.items() if name in signature.parameters}
    keywords = {**wanted, **arguments}
    try:
        signature.bind(**keywords)
    except TypeError as error:
        raise InputError(
            f"arguments that {spec}{signature} takes",
            got=f"{', '.join(keywords) or 'none'} ({error})",
            remedy="give what is missing, and only names of the signature",
        ) from error
    try:
        return factory(**keywords)
    except BarEdgeError:
        raise
    except Exception as error:
        raise InputError(
            f"{spec} returns when called with {keywords}",
            got=f"{type(error).__name__}: {error}",
            remedy="correct the arguments or the factory; --debug shows the traceback",
        ) from error
