"""The one representation of a network: an fx graph whose operations with parameters are nn modules."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

from bar_edge.errors import InputError
from bar_edge.files import make_folder, read_json, write_bytes, write_json
from bar_edge.network.graph_json import FORMAT, check_size, describe, dtype_named, rebuild, tie, without_aliases

if TYPE_CHECKING:
    from bar_edge.network.channels import Passages

#: how a flat tuple of outputs is returned: an index, or {"tuple" | "list": [...]} or {"dict": {name: ...}} of such
Structure = Any


class Network(nn.Module):
    """A traced network that trains, slices, saves and loads without the class that made it.

    Inputs are (N, *input_shapes[i]); N is free, the other sizes are those of the trace. Parameters keep
    the user's names under `body`. For N = 2, `shapes` maps every tensor of the graph to its shape and
    `sizes` every other value (a size, a sum of sizes) to its number.
    """

    def __init__(self, body: fx.GraphModule, input_shapes: tuple[tuple[int, ...], ...], out_spec: Structure) -> None:
        super().__init__()
        self.body, self.input_shapes, self.out_spec = body, input_shapes, out_spec
        #: what whoever hands the module over should know of its trace
        self.notes: tuple[str, ...] = ()
        body.graph.lint()
        _check_structure(out_spec, len(body.graph.output_node().args[0]))  # type: ignore[arg-type]
        self.shapes, self.sizes = propagate_shapes(body, input_shapes)

    def forward(self, *inputs: Tensor) -> Any:
        """Run the graph and return what the user's module returned; raises InputError as `check_inputs` does."""
        self.check_inputs(*inputs)
        return unflatten(self.body(*inputs), self.out_spec)

    def check_inputs(self, *inputs: Tensor) -> None:
        """Raise InputError for inputs of another shape than the trace's, the batch aside.

        Sizes that forward computes with are numbers in the graph.
        """
        for x, shape in zip(inputs, self.input_shapes, strict=False):
            if tuple(x.shape[1:]) != shape:
                raise InputError(
                    f"an input of shape Nx{'x'.join(map(str, shape))}, as the network was traced",
                    got="x".join(map(str, x.shape)),
                    consequence="its answer would be wrong without a word",
                    remedy="resize the images, or trace the network with --input of this size",
                )

    @property
    def nodes(self) -> list[fx.Node]:
        """The operations in the order in which they run."""
        return list(self.body.graph.nodes)

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls, or None for a function."""
        return self.body.get_submodule(str(node.target)) if node.op == "call_module" else None

    @functools.cached_property
    def constants(self) -> frozenset[fx.Node]:
        """The tensors of the graph that depend on parameters, buffers and numbers alone."""
        from bar_edge.network.channels import constant_nodes  # the rules read networks

        return constant_nodes(self)

    @functools.cached_property
    def channels(self) -> Passages:
        """How every tensor of the graph gets its channels, found once: the graph of a network does not change."""
        from bar_edge.network.channels import passages

        return passages(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs: what is known of the nodes of this graph is not true of those of its copy."""
        return {name: value for name, value in self.__dict__.items() if name not in ("channels", "constants")}

    @property
    def fingerprint(self) -> str:
        """Hash of the graph and its modules' settings, not of the weights, their types, which are frozen or absent."""
        described = describe(self.body, self.input_shapes, self.out_spec)
        del described["dtypes"], described["frozen"]
        for tensor in described["tensors"].values():
            if dtype_named(tensor["dtype"]).is_floating_point:  # the same network in float64
                tensor["dtype"] = "torch.float32"
        for settings in described["modules"].values():
            settings.pop("affine", None)
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write network.json and weights.safetensors, the weights first; raises InputError where that cannot be."""
        make_folder(folder)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.body.state_dict().items()}
        write_bytes(folder / "weights.safetensors", save(without_aliases(tensors)))
        write_json(folder / "network.json", describe(self.body, self.input_shapes, self.out_spec))

    @classmethod
    def load(cls, folder: Path) -> Network:
        """Read what `save` wrote; raises InputError for anything else."""
        data = read_json(folder / "network.json")
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise InputError(
                f"a network folder of format {FORMAT}", got=folder.name, remedy="name a folder of bar-edge"
            )
        try:
            weights = folder / "weights.safetensors"
            check_size(data, weights.stat().st_size)
            network = cls(*rebuild(data))
            tensors = load_file(weights)
            own = network.body.state_dict()
            missing = sorted(set(own) - set(tensors) - set(data["aliases"]))
            if missing or any(own[name].shape != tensor.shape for name, tensor in tensors.items()):
                raise ValueError(f"weights.safetensors does not fit network.json (missing: {missing[:5]})")
            tensors |= {name: tensors[source] for name, source in data["aliases"].items()}
            network.body.load_state_dict(tensors)
            for name, source in data["aliases"].items():
                tie(network.body, name, source)
            for name in data.get("frozen", []):  # files of older versions have none
                network.body.get_parameter(name).requires_grad_(False)
        except Exception as error:  # the files may be anybody's: whatever they make us stumble over is their fault
            raise InputError(
                "a complete network folder",
                got=f"{folder.name}: {type(error).__name__}: {error}",
                remedy="export it again",
            ) from error
        return network


def unflatten(flat: tuple[Any, ...], out_spec: Structure) -> Any:
    """Return a graph's flat outputs in the structure that the user's module returned."""
    if isinstance(out_spec, int):
        return flat[out_spec]
    ((kind, parts),) = out_spec.items()
    if kind == "dict":
        return {name: unflatten(flat, part) for name, part in parts.items()}
    return (tuple if kind == "tuple" else list)(unflatten(flat, part) for part in parts)


def structure_of(value: Any) -> Structure:
    """Return the structure of nested tuples, lists and mappings whose leaves are the numbers 0, 1, 2, ..."""
    if isinstance(value, int):
        return value
    if isinstance(value, Mapping):
        return {"dict": {str(name): structure_of(part) for name, part in value.items()}}
    if isinstance(value, tuple | list):
        return {"list" if isinstance(value, list) else "tuple": [structure_of(part) for part in value]}
    raise InputError("a forward that returns tensors in tuples, lists and dictionaries", got=type(value).__name__)


def _check_structure(spec: Structure, outputs: int) -> None:
    if isinstance(spec, int) and not isinstance(spec, bool):
        if not 0 <= spec < outputs:
            raise ValueError(f"output {spec} of {outputs}")
        return
    ((kind, parts),) = spec.items()
    if kind not in ("tuple", "list", "dict"):
        raise ValueError(f"unknown structure of outputs {kind}")
    for part in parts.values() if kind == "dict" else parts:
        _check_structure(part, outputs)


def is_network_folder(folder: Path) -> bool:
    """Tell whether `folder` looks like something that Network.save wrote."""
    return (folder / "network.json").is_file()


def propagate_shapes(
    body: fx.GraphModule, input_shapes: tuple[tuple[int, ...], ...], n: int = 2
) -> tuple[dict[str, tuple[int, ...]], dict[str, int | float]]:
    """Return the shape of every tensor of a graph, and every other value, for a batch of n."""
    shapes: dict[str, tuple[int, ...]] = {}
    sizes: dict[str, int | float] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            module = body.get_submodule(str(n.target)) if n.op == "call_module" else None
            same = isinstance(module, KEEP_SHAPE)  # fake BatchNorm takes a hundredth of a second
            # as dense as what a norm makes, also of an expanded tensor
            value = torch.empty_like(self.fetch_args_kwargs_from_env(n)[0][0]) if same else super().run_node(n)
            first = value[0] if isinstance(value, tuple | list) and n.target in _PAIRS else value
            if isinstance(first, Tensor):
                shapes[n.name] = tuple(first.shape)
            elif isinstance(value, int | float):
                sizes[n.name] = value
            return value

    modes = {module: module.training for module in body.modules()}
    body.eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        device = next((p.device for p in body.parameters()), torch.device("cpu"))
        dtype = next((p.dtype for p in body.parameters()), torch.float32)
        Recorder(body).run(*(torch.empty(n, *shape, device=device, dtype=dtype) for shape in input_shapes))
    for module, training in modes.items():
        module.training = training
    return shapes, sizes


#: what keeps the shape of its input
KEEP_SHAPE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Dropout)
#: operators that return values and their indices: their shape is that of the values
_PAIRS = {
    torch.ops.aten.max.dim,
    torch.ops.aten.min.dim,
    torch.ops.aten.adaptive_max_pool1d.default,
    torch.ops.aten.adaptive_max_pool2d.default,
    torch.ops.aten.adaptive_max_pool3d.default,
    torch.ops.aten.max_pool1d_with_indices.default,
    torch.ops.aten.max_pool2d_with_indices.default,
    torch.ops.aten.max_pool3d_with_indices.default,
}
