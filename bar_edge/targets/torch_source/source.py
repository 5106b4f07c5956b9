"""A network as readable Python: model.py and model.safetensors, for a colleague who has torch but not bar-edge."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import fx, nn

from bar_edge.errors import InputError
from bar_edge.files import make_folder, write_bytes
from bar_edge.network import Network, leaves
from bar_edge.network.graph_json import check_path, describe
from bar_edge.targets.torch_source.expressions import Expressions
from bar_edge.targets.torch_source.operators import PER_AXIS
from bar_edge.targets.torch_source.parts import IMPORTS, LOAD, PARTS, TOP, our_leaves
from bar_edge.targets.torch_source.texts import block_of, one_number, path_of, short_tuple, tuple_of, wrapped
from bar_edge.targets.torch_source.variables import BETWEEN, name_variables, statements


def write_torch_source(network: Network, folder: Path) -> Path:
    """Write model.py and model.safetensors, which need bar-edge no more, and return the path of model.py.

    There, `load()` returns an nn.Module with the network's state dict names, outputs and training. Raises
    InputError for operators that torch alone does not have.
    """
    source = _Source(network)
    text = source.text()
    make_folder(folder)
    path, weights = folder / "model.py", folder / "model.safetensors"
    state = network.body.state_dict()
    write_bytes(weights, save({name: state[name].detach().cpu().contiguous().clone() for name in source.state}))
    write_bytes(path, text.encode())
    return path


class _Source:
    """The parts of model.py; every name in it is a checked identifier, every string a repr."""

    def __init__(self, network: Network) -> None:
        self.network, self.body = network, network.body
        data = describe(network.body, network.input_shapes, network.out_spec)
        self.modules: dict[str, dict[str, Any]] = data["modules"]
        self.tensors: dict[str, dict[str, Any]] = data["tensors"]
        for name in (*self.modules, *self.tensors):
            check_path(name)
        #: what the constructors of the modules make
        self.own = {f"{name}.{leaf}" for name in self.modules for leaf in self._fresh(name).state_dict()}
        everything = self.own | set(self.tensors)
        #: the names in Model's state dict
        self.state = [name for name in self.body.state_dict() if name in everything]
        self.aliases = {a: b for a, b in data["aliases"].items() if a in everything and b in everything}
        self.nodes, itself = statements(network)
        self.names = name_variables(network, self.nodes, itself)
        self.expressions = Expressions(network, self.names, itself)

    def _kind(self, module: str) -> type[nn.Module]:
        return type(self.body.get_submodule(module))

    def _settings(self, module: str) -> dict[str, Any]:
        settings = {name: value for name, value in self.modules[module].items() if name != "type"}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}

    def _fresh(self, module: str) -> nn.Module:
        with torch.device("meta"):
            return self._kind(module)(**self._settings(module))

    # ------------------------------------------------------------------------------------ the file

    def text(self) -> str:
        """Return the whole of model.py."""
        init, forward = list(self._init()), list(self._forward())
        inputs = ", ".join(
            f"{self.names[node]}: (N, {', '.join(str(int(n)) for n in shape)})"
            for node, shape in zip(self._placeholders(), self.network.input_shapes, strict=False)
        )
        imports, leaves = our_leaves({self._kind(name) for name in self.modules})
        lines = [
            f"class Model({'Parts' if any('self[' in line for line in (*init, *forward)) else 'nn.Module'}):",
            f'    """The network; {inputs}."""',
            "",
            "    def __init__(self) -> None:",
            *(f"        {line}" for line in ("super().__init__()", *init)),
            "",
            f"    {forward[0]}",
            *(f"        {line}" for line in forward[1:]),
        ]
        model = "\n".join(wrapped(line.rstrip()) for line in lines)
        top = TOP.format(torch=torch.__version__.partition("+")[0])
        parts = [PARTS] if "Parts" in model else []
        return "\n\n\n".join(part.strip() for part in (top + IMPORTS + imports, *leaves, *parts, model, LOAD)) + "\n"

    def _placeholders(self) -> list[fx.Node]:
        return [node for node in self.network.nodes if node.op == "placeholder"]

    def _init(self) -> Iterator[str]:
        """Declare modules and tensors in the order in which they are used."""
        state = self.body.state_dict()
        floating = {name: state[name].dtype for name in self.state if state[name].is_floating_point()}
        kinds = set(floating.values())
        declared = {""}

        def cast_of(module: str) -> str:
            found = {floating[n] for n in self.own & floating.keys() if n.rpartition(".")[0] == module}
            if len(found) > 1:
                raise InputError("modules that hold numbers of one type", got=f"{module}: {found}")
            return f".to({next(iter(found))})" if len(kinds) > 1 and found - {torch.float32} else ""

        def zeros(name: str) -> str:
            dtype = torch.float32 if name in floating and len(kinds) == 1 else state[name].dtype
            return f"torch.zeros({tuple(state[name].shape)}{'' if dtype == torch.float32 else f', dtype={dtype}'})"

        def declare(name: str) -> Iterator[str]:
            if name in declared:
                return
            declared.add(name)
            parent, _, leaf = name.rpartition(".")
            yield from declare(parent)
            if name in self.modules:
                yield f"{path_of(name)} = {self._constructor(name)}{cast_of(name)}"
            elif name not in self.tensors:
                yield f"{path_of(name)} = Parts()"
            elif name not in self.own and self.tensors[name]["parameter"]:
                fixed = "" if name in floating else ", requires_grad=False"
                yield f"{path_of(name)} = nn.Parameter({zeros(name)}{fixed})"
            elif name not in self.own:
                yield f"{path_of(parent)}.register_buffer({self.expressions.value(leaf)}, {zeros(name)})"

        block: str | None = None
        for node in self.network.nodes:
            if node.op in ("call_module", "get_attr"):
                lines = list(declare(str(node.target)))
                here = self._block(node, block) if lines else block
                yield from [""] if block not in (None, here) else []
                yield from lines
                block = here
        for name, source in self.aliases.items():
            yield f"{path_of(name)} = {path_of(source)}  # one tensor under two names"
        if len(kinds) == 1 and kinds != {torch.float32}:
            yield f"self.to({next(iter(kinds))})"

    def _constructor(self, module: str) -> str:
        """Return the call that makes a module: what has no default first, the rest by name where it differs."""
        kind, settings = self._kind(module), self._settings(module)
        is_conv = isinstance(self.body.get_submodule(module), nn.modules.conv._ConvNd)
        arguments = []
        for name, parameter in inspect.signature(kind).parameters.items():
            if name not in settings:
                continue
            value = one_number(settings[name]) if is_conv and name in PER_AXIS else settings[name]
            if parameter.default is inspect.Parameter.empty:
                text = short_tuple(value) if isinstance(value, tuple) else repr(value)
                arguments.append(f"{name}={text}" if isinstance(value, bool) else text)
            elif value != parameter.default:
                arguments.append(f"{name}={value!r}")
        library = "" if kind.__module__ == leaves.__name__ else "nn."
        return f"{library}{kind.__name__}({', '.join(arguments)})"

    def _forward(self) -> Iterator[str]:
        """Write one statement per operation."""
        output = self.nodes[-1].args[0]
        assert isinstance(output, tuple | list)
        body: list[str] = []
        block: str | None = None
        for node in self.nodes:
            if node.op == "call_module":
                here = self._block(node, block)
                body += [""] if block not in (None, here) else []
                block = here
                text = f"{path_of(str(node.target))}({self.expressions.listed(node.args, node.kwargs)})"
            elif node.op == "call_function":
                text = self.expressions.call(node)
            else:
                continue
            body.append(f"{self.names[node]} = {text}" if node.users else text)
        inputs = [self.names[node] for node in self._placeholders()]
        spec = self.network.out_spec
        returned = "Tensor" if isinstance(spec, int) else next(iter(spec))
        yield f"def forward(self, {', '.join(f'{name}: Tensor' for name in inputs)}) -> {returned}:"
        if self.expressions.uses_device:
            yield f"device = {inputs[0]}.device"
        yield from body
        yield f"return {self._structure(spec, list(output))}"

    def _block(self, node: fx.Node, before: str | None) -> str | None:
        """Return the block that a module or weight belongs to; what surgery put between belongs where it stands."""
        return before if isinstance(self.network.module_of(node), BETWEEN) else block_of(str(node.target))

    def _structure(self, spec: Any, flat: list[Any]) -> str:
        if isinstance(spec, int):
            return self.expressions.value(flat[spec])
        ((kind, parts),) = spec.items()
        if kind == "dict":
            return (
                "{"
                + ", ".join(f"{self.expressions.value(str(k))}: {self._structure(v, flat)}" for k, v in parts.items())
                + "}"
            )
        texts = [self._structure(part, flat) for part in parts]
        return f"[{', '.join(texts)}]" if kind == "list" else tuple_of(texts)
