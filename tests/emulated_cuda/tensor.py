"""A tensor that says it is on `cuda:0` and keeps its numbers on the CPU, and what CUDA would say of each operator."""

from typing import Any, NoReturn

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from . import state

# operators whose CUDA kernel hands a number back to the host before it returns
READS = {
    "aten::_local_scalar_dense": "item",
    "aten::_linalg_check_errors": "error check of linalg",
    "aten::_linalg_eigh": "error check of linalg",
    "aten::_linalg_svd": "error check of linalg",
    "aten::_unique2": "unique",
    "aten::allclose": "allclose",
    "aten::bincount": "bincount",
    "aten::cholesky": "error check of linalg",
    "aten::equal": "equal",
    "aten::histc": "histc",
    "aten::linalg_eig": "error check of linalg",
    "aten::linalg_lstsq": "error check of linalg",
    "aten::masked_select": "masked_select",
    "aten::multinomial": "multinomial",
    "aten::nonzero": "nonzero",
    "aten::unique_consecutive": "unique",
    "aten::unique_dim": "unique",
}
CHECKED_ON_REQUEST = {"aten::linalg_cholesky_ex", "aten::linalg_inv_ex", "aten::linalg_lu_factor_ex"}
# without a CUDA kernel by their documentation; what is not named is taken to have one for the CPU's dtypes
CPU_ONLY = {"aten::histogram", "aten::histogramdd", "aten::_histogramdd_bin_edges"}
NO_INTEGERS = {f"aten::{name}" for name in ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "vdot")}
INDEXING = {f"aten::{name}" for name in ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_")}
# operators that take no CPU scalar beside tensors of the device
NO_CPU_SCALAR = {f"aten::{name}" for name in ("cat", "stack", "index_select", "gather")}
MATH_FORM = 0  # of scaled_dot_product_attention
MASKS = (torch.bool, torch.uint8)


class CudaTensor(torch.Tensor):
    """A tensor on the emulated card. `on_cpu` is where its numbers are."""

    on_cpu: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> "CudaTensor":
        strided = inner.layout == torch.strided
        place = {"strides": inner.stride(), "storage_offset": inner.storage_offset()} if strided else {}
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, **place, dtype=inner.dtype, layout=inner.layout, device=device
        )
        self.on_cpu = inner.detach()
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["on_cpu"], self.device

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, torch.Tensor], device: Any, size: Any, stride: Any) -> "CudaTensor":
        return CudaTensor(parts["on_cpu"], device)

    def data_ptr(self) -> int:
        return self.on_cpu.data_ptr()

    def numpy(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def new_tensor(self, data: Any, dtype: Any = None, device: Any = None, *_: Any, **__: Any) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(self._with_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(self._with_tensors(index), value)

    def _with_tensors(self, index: Any) -> Any:
        """An index whose lists and ranges are tensors of the card, uploaded as torch uploads them."""
        if isinstance(index, tuple):
            return tuple(map(self._with_tensors, index))
        return torch.tensor(index).to(self.device) if isinstance(index, list | range) else index

    def __dlpack_device__(self) -> Any:
        return 2, self.device.index  # kDLCUDA

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:
        """A capsule of the CPU's memory: whoever takes it has to say by himself that it is the card's."""
        if self.requires_grad:
            raise BufferError("Can't export tensors that require gradient, use tensor.detach()")
        if stream is not None and not isinstance(stream, int):
            raise TypeError(f"stream must be an int or None, got {type(stream).__name__}")
        return self.on_cpu.__dlpack__()

    def __repr__(self, **_: Any) -> str:
        return f"{self.on_cpu!r}@{self.device}"

    def __reduce_ex__(self, _: Any) -> Any:
        return CudaTensor, (self.on_cpu, self.device)

    def __deepcopy__(self, memo: Any) -> Any:
        if id(self) not in memo:
            copy = CudaTensor(self.on_cpu.clone(), self.device).requires_grad_(self.requires_grad)
            parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if parameter else copy
        return memo[id(self)]


class Mode(TorchDispatchMode):
    """Brings operators without a tensor of the card here, above all those that make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the inner tensors, under CUDA's rules."""
    name = func._schema.name
    flat, spec = tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, CudaTensor)]
    asked = kwargs.get("device")
    asked = None if asked is None else torch.device(asked)
    to_card = asked is not None and asked.type == "cuda"
    if not ours and not to_card:
        return func(*args, **kwargs)
    card = state.card()
    if to_card:
        asked = card.place(asked)
    device = asked if asked is not None and not ours else ours[0].device
    if name in OPDEFS:  # an operator written in Python sees tensors of the card
        with Mode():
            return OPDEFS[name]._init_fn(*args, **kwargs)
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        with Mode():  # called by such an operator, below autograd, which takes them apart elsewhere
            return func.decompose(*args, **kwargs)
    inner_args, inner_kwargs = tree_unflatten([unwrap(x) for x in flat], spec)
    if asked is not None:
        inner_kwargs["device"] = torch.device("cpu")
    if to_card:
        inner_kwargs.pop("pin_memory", None)

    if name in ("aten::_to_copy", "aten::copy_"):
        return _copied(func, args, kwargs, asked or args[0].device, inner_args, inner_kwargs)
    if name == "aten::_fused_sdp_choice":
        return MATH_FORM
    if name == "aten::is_pinned":
        return False
    _refuse(name, ours, kwargs)
    _check_devices(func, name, args, tensors, device, making=asked is not None)
    _count_reads(name, args, kwargs)

    out = _run(func, inner_args, inner_kwargs)
    if name == "aten::_local_scalar_dense":
        return out
    out = tree_map(lambda x: CudaTensor(x, device) if isinstance(x, torch.Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if func._schema.is_mutable or func.is_view else out


def unwrap(x: Any) -> Any:
    return x.on_cpu if isinstance(x, CudaTensor) else x


def _copied(
    func: Any, args: Any, kwargs: dict[str, Any], target: torch.device, inner_args: Any, inner_kwargs: dict[str, Any]
) -> torch.Tensor:
    """A copy between devices, or within one: counted, and on the side where it belongs."""
    in_place = func._schema.name == "aten::copy_"
    source = args[1] if in_place else args[0]
    waits = not (kwargs.get("non_blocking") or (in_place and len(args) > 2 and args[2]))
    card = state.card()
    if target.type == "cpu" and source.device.type == "cuda":
        if waits:
            card.read("to cpu")
        else:  # no wait, but nothing may be captured into memory that is not pinned
            card.refuse_to_capture("to cpu")
    elif target.type == "cuda" and source.device.type == "cpu" and not (in_place and source.dim() == 0):
        if not getattr(source, "emulated_pinned", False):
            card.upload("upload")
        elif waits:
            card.read("upload of pinned memory without non_blocking")
    out = _run(func, inner_args, inner_kwargs)
    if in_place:
        return args[0]
    if target.type == "cpu":
        return out.clone() if out.data_ptr() == inner_args[0].data_ptr() else out
    return CudaTensor(out, target)


def _refuse(name: str, ours: list[CudaTensor], kwargs: dict[str, Any]) -> None:
    """What has no CUDA kernel, and generators of another device."""
    if name in CPU_ONLY:
        raise NotImplementedError(f"Could not run '{name}' with arguments from the 'CUDA' backend.")
    if name in NO_INTEGERS and not (ours[0].is_floating_point() or ours[0].is_complex()):
        raise RuntimeError(f"\"{name[6:]}_cuda\" not implemented for '{str(ours[0].dtype)[6:].capitalize()}'")
    generator = kwargs.get("generator")
    if generator is not None and generator._cdata not in state.card().generators:
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{generator.device.type}'")


def _check_devices(
    func: Any, name: str, args: Any, tensors: list[torch.Tensor], device: torch.device | None, making: bool
) -> None:
    """No operator mixes devices, but for CPU scalars beside tensors of the card and CPU indices into them."""
    indexing = name in INDEXING
    if indexing and not isinstance(args[0], CudaTensor):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    values = args[2] if indexing and len(args) > 2 else None
    for x in tensors:
        if isinstance(x, CudaTensor):
            if x.device != device and x.dim():
                raise _mixed(device, x.device, func)
        elif indexing and x is not values:
            state.card().upload("upload of an index")
        elif indexing and not all(i is None or i.dtype in MASKS for i in args[1]):
            state.card().upload("upload of a scalar into index_put")
        elif not making and (x.dim() or name in NO_CPU_SCALAR):
            raise _mixed(device, x.device, func)


def _mixed(a: Any, b: Any, func: Any) -> RuntimeError:
    return RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {a} and {b}! ({func})"
    )


def _count_reads(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    card = state.card()
    if name in READS:
        card.read(READS[name])
    if name in CHECKED_ON_REQUEST and kwargs.get("check_errors"):
        card.read("error check of linalg")
    if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
        card.read("repeat_interleave without output_size")
    if name in INDEXING and any(isinstance(i, torch.Tensor) and i.dtype in MASKS for i in args[1]):
        fills = len(args) > 2 and args[2].numel() == 1 and args[2].device.type == "cpu"  # torch makes it masked_fill_
        if not fills:
            card.read("index by a mask")


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Call the operator. While a graph is captured: keep the call, whose results go into the very memory they were in
    at first."""
    card = state.card()
    if func._schema.is_mutable:
        card.remember(x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor))
    out = func(*args, **kwargs)
    if card.captured is None or func.is_view:
        return out
    first = [x for x in tree_flatten(out)[0] if isinstance(x, torch.Tensor)]

    def again() -> None:
        results = [x for x in tree_flatten(func(*args, **kwargs))[0] if isinstance(x, torch.Tensor)]
        for old, new in zip(first, results, strict=True):
            if old.data_ptr() != new.data_ptr() and not func._schema.name.startswith("aten::empty"):
                old.copy_(new)

    card.capture(again)
    return out
