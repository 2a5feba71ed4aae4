"""A backend of torch.compile that runs on the CPU under the rules by which inductor replays CUDA graphs.

Parameters, buffers and what is marked as of fixed address are read where they lie; every other input is copied into
memory of the graph. The outputs of a replay are overwritten by the next one. Nothing else may be written, and no graph
holds where the host reads a value.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from functorch.compile import make_boxed_func  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext
from torch.fx import GraphModule, Node

WAITS = frozenset({"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique"})


@dataclass
class Replays:
    """What became of a compiled call.

    Attributes:
        graphs: each graph that was compiled, after functionalisation.
        recorded: recordings; more than one for a graph where what is of fixed address moved.
        skipped: why inductor would run a graph without CUDA graphs.
        inputs: the tensors that the last call of each graph copied in.
    """

    graphs: list[GraphModule] = field(default_factory=list)
    recorded: int = 0
    skipped: list[str] = field(default_factory=list)
    inputs: list[list[Tensor]] = field(default_factory=list)
    _outputs: dict[int, list[Tensor]] = field(default_factory=dict)

    @property
    def backend(self) -> Any:
        compiler = aot_autograd(fw_compiler=self._compile, keep_inference_input_mutations=True)
        return lambda graph, inputs: compiler(graph, inputs)  # transformers copies what is no function

    def overwrite(self, *graphs: int) -> None:
        """What a new step does to the outputs of the one before, of all graphs or of some: who still reads them reads
        NaN."""
        for number in graphs or list(self._outputs):
            for output in self._outputs.pop(number, []):
                output.fill_(float("nan") if output.is_floating_point() else -1)

    def _compile(self, graph: GraphModule, _: list[Any]) -> Any:
        context = TracingContext.try_get()
        assert context is not None
        assert context.fw_metadata is not None
        fixed = set(context.fw_metadata.static_input_indices)
        number = len(self.graphs)
        self.graphs.append(graph)
        self.inputs.append([])
        self.skipped += _reasons(graph, fixed)
        memory: dict[Any, list[Any]] = {}

        def run(*inputs: Any) -> Any:
            copied = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and i not in fixed]
            recording = tuple(
                (*x.shape,) if i in copied else x.data_ptr() if i in fixed else x for i, x in enumerate(inputs)
            )
            if recording not in memory:
                memory[recording] = [x.clone() if i in copied else x for i, x in enumerate(inputs)]
                self.recorded += 1
            own = memory[recording]
            for i in copied:
                own[i].copy_(inputs[i])
            self.inputs[number] = [inputs[i] for i in copied]
            self.overwrite(number)
            results = graph(*own)
            kept = {x.untyped_storage().data_ptr() for x in own if isinstance(x, Tensor)}
            self._outputs[number] = [
                x for x in results if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in kept
            ]
            return results

        return make_boxed_func(run)


def _reasons(graph: GraphModule, fixed: set[int]) -> list[str]:
    reasons = []
    places = {node: i for i, node in enumerate(graph.graph.find_nodes(op="placeholder"))}
    for node in graph.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(graph, node.target), Tensor):
            reasons.append(f"a tensor baked in: {node.target}")
        if node.op == "placeholder" and isinstance(node.meta["val"], torch.SymInt):
            reasons.append(f"recorded for each value of {node}")
        if node.op != "call_function":
            continue
        name = getattr(node.target, "__name__", str(node.target))
        if name.split(".")[0] in WAITS:
            reasons.append(f"the host reads a value: {node.format_node()}")
        if torch.Tag.cudagraph_unsafe in getattr(node.target, "tags", ()):
            reasons.append(f"an operator that no CUDA graph holds: {name}")
        written = node.args[0] if name.split(".")[0] in ("copy_", "set_") else None
        if isinstance(written, Node) and written in places and places[written] not in fixed:
            reasons.append(f"writes an input without a fixed address: {written.meta['val'].shape}")
    return reasons
