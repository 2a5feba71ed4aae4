"""Runs a warp-specialised Gluon kernel's own Python source on CPU tensors, and looks for faults of its barriers.

Covered: the partitions of `warp_specialize` as threads of which one runs at a time, switched at every barrier, copy and
product by a fixed priority, so that a run repeats exactly; mbarriers with arrivals, phases and bytes; TMA loads that
fill with 0 beyond the descriptor; asynchronous products in order. With `late`, a copy lands only when no partition can
go on (as it says, the newest or the oldest first) and a product reads its operands only when a wait demands it;
otherwise both happen at once.
A shared tile holds NaN from its allocation, and from the start of a copy into it, until the copy lands. A deadlock,
arrivals beyond a barrier's count, a copy or a product that nobody waited for, and a store beyond its tensor raise.

Not covered: layouts and swizzling (all are ignored), registers, proxy fences and memory ordering, the warps inside a
partition, 32-bit overflow, division of negative integers (rounds as Python's), the rounding of the tensor cores.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from triton.language import constexpr
from triton.runtime.jit import JITFunction

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
DTYPES |= {"int16": torch.int16, "int32": torch.int32, "int64": torch.int64}
PAIRS = {"cvt.rn.bf16x2.f32 $0, $2, $1;": torch.bfloat16, "cvt.rn.f16x2.f32 $0, $2, $1;": torch.float16}
REGISTER_FILE = 65536


class FaultError(Exception):
    """On a GPU the kernel would hang, or read or write what it must not."""


class Tile(torch.Tensor):
    """A register tile: a tensor with Triton's `split` and `to`."""

    def split(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.unbind(-1)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.view(dtype) if bitcast else super().to(dtype)


class ProgramId(int):
    def to(self, _dtype: torch.dtype) -> "ProgramId":
        return self


@dataclass
class Barrier:
    """An mbarrier: a phase completes when all arrivals and all expected bytes have come."""

    name: str
    count: int = 0
    pending: int = 0
    size: int = 0
    phase: int = 0

    def settle(self) -> None:
        if self.pending < 0:
            raise FaultError(f"too many arrivals at {self.name} in phase {self.phase}")
        if self.pending == 0 and self.size == 0:
            self.phase += 1
            self.pending = self.count


@dataclass
class Shared:
    """Shared memory of tiles."""

    data: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def index(self, i: int) -> "Shared":
        return Shared(self.data[i])

    def reshape(self, shape: Sequence[int]) -> "Shared":
        return Shared(self.data.view(*shape))

    def permute(self, order: Sequence[int]) -> "Shared":
        return Shared(self.data.permute(*order))

    def load(self, _layout: None) -> torch.Tensor:
        return self.data.clone().as_subclass(Tile)


@dataclass
class Barriers:
    items: list[Barrier]

    def index(self, i: int) -> Barrier:
        return self.items[i]


class Descriptor:
    """A tensor descriptor: blocks with 0 beyond the tensor."""

    def __init__(self, host: Any) -> None:
        self.tensor = torch.as_strided(host.base, host.shape, host.strides)
        self.shape, self.dtype, self.layout = list(host.shape), host.base.dtype, None
        block = list(host.block_shape)
        self.block_type = SimpleNamespace(shape=block, nbytes=math.prod(block) * host.base.element_size())

    def read(self, start: Sequence[int]) -> torch.Tensor:
        block = torch.zeros(self.block_type.shape, dtype=self.dtype)
        ends = [min(at + size, end) for at, size, end in zip(start, block.shape, self.shape, strict=True)]
        firsts = [max(at, 0) for at in start]
        if all(first < end for first, end in zip(firsts, ends, strict=True)):
            inside = [slice(first, end) for first, end in zip(firsts, ends, strict=True)]
            target = [slice(s.start - at, s.stop - at) for s, at in zip(inside, start, strict=True)]
            block[tuple(target)] = self.tensor[tuple(inside)]
        return block


@dataclass
class Pointer:
    """A pointer into a tensor's storage, or a tile of pointers."""

    tensor: torch.Tensor
    offset: Any = 0

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.tensor, self.offset + offset)


@dataclass(eq=False)
class Product:
    """An asynchronous matrix product."""

    run: Callable[[], torch.Tensor]
    shape: Sequence[int]
    value: torch.Tensor | None = None
    awaited: bool = False

    def finish(self) -> None:
        self.value = self.run() if self.value is None else self.value


@dataclass(eq=False)
class Partition:
    """A thread of `warp_specialize`, and the barrier and parity that it waits for."""

    function: Callable[..., None]
    arguments: tuple[Any, ...]
    blocked: tuple[Barrier, int] | None = None
    products: list[Product] = field(default_factory=list)
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    done: bool = False
    error: BaseException | None = None

    def ready(self) -> bool:
        return not self.done and (self.blocked is None or self.blocked[0].phase % 2 != self.blocked[1])


class Emulator:
    """`Emulator(kernel, priority, late, check)[grid](...)` runs `kernel`; `priority` ranks its partitions.

    `check` is called at the end of each program with the partitions that started products, in their order.
    """

    def __init__(
        self,
        kernel: Any,
        priority: Sequence[int],
        late: str | None,
        check: Callable[[list[int]], None] = lambda _: None,
    ) -> None:
        self.priority, self.late, self.check = priority, late, check
        self.starts: list[Partition] = []
        self.grid, self.program = (0, 0, 0), (0, 0, 0)
        self.current: Partition | None = None
        self.returned = threading.Semaphore(0)
        self.stopping = False
        self.copies: list[Callable[[], None]] = []
        barriers = {"init": self.init, "expect": self.expect, "arrive": self.arrive, "wait": self.wait}
        scope: dict[str, Any] = {}
        for value in kernel.fn.__globals__.values():
            scope |= value.fn.__globals__ if isinstance(value, JITFunction) else {}
        scope |= kernel.fn.__globals__
        for name, value in scope.items():
            if isinstance(value, JITFunction):
                scope[name] = FunctionType(value.fn.__code__, scope, name)
            elif isinstance(value, constexpr):
                scope[name] = value.value
        scope |= {
            "gl": self.language(),
            "mbarrier": SimpleNamespace(**barriers, MBarrierLayout=no_layout),
            "accumulator_layout": no_layout,
            "halves_layout": no_layout,
            "fence_async_shared": lambda: None,
            "tma_load": self.tma_load,
            "warpgroup_mma": self.warpgroup_mma,
            "warpgroup_mma_wait": self.warpgroup_mma_wait,
        }
        self.body = scope[kernel.fn.__name__]

    def language(self) -> SimpleNamespace:
        return SimpleNamespace(
            **DTYPES,
            program_id=lambda axis: ProgramId(self.program[axis]),
            num_programs=lambda axis: self.grid[axis],
            allocate_shared_memory=self.allocate,
            warp_specialize=self.warp_specialize,
            store=store,
            static_range=range,
            minimum=lambda a, b: torch.minimum(a, b) if isinstance(a, Tile) else min(a, b),
            maximum=lambda a, b: torch.maximum(a, b) if isinstance(a, Tile) else max(a, b),
            cdiv=lambda a, b: -(-a // b),
            arange=lambda *ends, **_: torch.arange(*ends).as_subclass(Tile),
            full=lambda shape, value, dtype, _: torch.full(shape, value, dtype=dtype).as_subclass(Tile),
            zeros=lambda shape, dtype, _: torch.zeros(shape, dtype=dtype).as_subclass(Tile),
            where=torch.where,
            max=lambda tile, axis: tile.amax(axis),
            sum=lambda tile, axis: tile.sum(axis),
            exp2=torch.exp2,
            log2=torch.log2,
            broadcast=torch.broadcast_tensors,
            join=lambda a, b: torch.stack([a, b], -1),
            convert_layout=lambda tile, _: tile,
            inline_asm_elementwise=inline_asm,
            SliceLayout=no_layout,
            DotOperandLayout=no_layout,
        )

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def launch(*, num_warps: int, maxnreg: int, enable_fp_fusion: bool, **arguments: Any) -> None:
            # two warpgroups, and a loader whose registers are allotted as a warpgroup's
            assert 3 * num_warps * 32 * maxnreg <= REGISTER_FILE
            assert enable_fp_fusion
            given = {name: on_device(x) for name, x in arguments.items()}
            self.grid = grid
            for program in range(math.prod(grid)):
                self.program = (program % grid[0], program // grid[0] % grid[1], program // grid[0] // grid[1])
                self.body(**given)

        return launch

    def allocate(self, dtype: torch.dtype, shape: list[int], _layout: None) -> Any:
        if dtype != torch.int64:
            return Shared(torch.full(shape, float("nan"), dtype=dtype))
        barriers = [Barrier(f"barrier {i} of {shape}") for i in range(shape[0])]
        return Barriers(barriers) if len(shape) == 2 else barriers[0]

    def warp_specialize(self, parts: list[Any], _warps: list[int], _registers: list[int]) -> None:
        partitions = [Partition(*part) for part in parts]
        threads = [threading.Thread(target=self._live, args=[partition], daemon=True) for partition in partitions]
        for thread in threads:
            thread.start()
        try:
            while not all(partition.done for partition in partitions):
                if able := [partitions[i] for i in self.priority if partitions[i].ready()]:
                    self._resume(able[0])
                elif self.copies:
                    self.copies.pop(0 if self.late == "oldest" else -1)()
                else:
                    waits = [f"{p.blocked[0]} (parity {p.blocked[1]})" for p in partitions if p.blocked]
                    raise FaultError(f"deadlock: the partitions wait for {', '.join(waits)}")
            if self.copies or any(partition.products for partition in partitions):
                raise FaultError("the kernel ended before a copy or a product that it had started")
            self.check([partitions.index(partition) for partition in self.starts])
        finally:
            self.stopping = True
            for partition in partitions:
                partition.turn.release()
            for thread in threads:
                thread.join()
            self.stopping, self.copies, self.starts = False, [], []

    def _live(self, partition: Partition) -> None:
        partition.turn.acquire()
        try:
            if not self.stopping:
                partition.function(*partition.arguments)
        except BaseException as error:
            partition.error = error
        partition.done = True
        self.returned.release()

    def _resume(self, partition: Partition) -> None:
        self.current, partition.blocked = partition, None
        partition.turn.release()
        self.returned.acquire()
        if partition.error is not None:
            raise partition.error

    def _pause(self, blocked: tuple[Barrier, int] | None = None) -> None:
        """Let the partition of the highest priority go on, which may be this one."""
        partition = self.current
        assert partition is not None
        partition.blocked = blocked
        self.returned.release()
        partition.turn.acquire()
        if self.stopping:
            raise SystemExit

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.pending = count

    def expect(self, barrier: Barrier, size: int) -> None:
        barrier.size += size
        self.arrive(barrier)

    def arrive(self, barrier: Barrier, count: int = 1) -> None:
        barrier.pending -= count
        barrier.settle()
        self._pause()

    def wait(self, barrier: Barrier, parity: int) -> None:
        self._pause((barrier, parity))

    def tma_load(self, descriptor: Descriptor, start: list[int], barrier: Barrier, shared: Shared) -> None:
        def land() -> None:
            shared.data.copy_(descriptor.read(start))
            barrier.size -= descriptor.block_type.nbytes
            barrier.settle()

        shared.data.fill_(float("nan"))
        self.copies.append(land)
        if not self.late:
            self.copies.pop()()
        self._pause()

    def warpgroup_mma(self, a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
        assert is_async
        assert self.current is not None

        def run() -> torch.Tensor:
            product = (a.data if isinstance(a, Shared) else a).float() @ b.data.float()
            return (acc + product if use_acc else product).as_subclass(Tile)

        product = Product(run, acc.shape)
        self.current.products.append(product)
        self.starts.append(self.current)
        if not self.late:
            product.finish()
        self._pause()
        return product

    def warpgroup_mma_wait(self, outstanding: int, deps: Sequence[Any]) -> Any:
        assert self.current is not None
        products = self.current.products
        while len(products) > outstanding:
            products[0].finish()
            products.pop(0).awaited = True
        results = [registers(x) if isinstance(x, Product) else x for x in deps]
        self._pause()
        return results[0] if len(results) == 1 else results


def on_device(x: Any) -> Any:
    """What a kernel gets for an argument of its launch."""
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*map(on_device, x))
    return Descriptor(x) if hasattr(x, "block_shape") else Pointer(x) if isinstance(x, torch.Tensor) else x


def no_layout(*_: object) -> None:
    return None


def registers(product: Product) -> torch.Tensor:
    """What the registers of a product hold: nothing to rely on before it has been waited for."""
    if product.awaited and product.value is not None:
        return product.value
    return torch.full(tuple(product.shape), float("nan")).as_subclass(Tile)


def inline_asm(instruction: str, _constraints: str, tiles: list[torch.Tensor], **_: object) -> torch.Tensor:
    low, high = (tile.to(PAIRS[instruction]).view(torch.int16).to(torch.int32) for tile in tiles)
    return (high << 16) | (low & 0xFFFF)


def store(pointer: Pointer, value: torch.Tensor, mask: torch.Tensor) -> None:
    offset, mask = (x.as_subclass(torch.Tensor) for x in torch.broadcast_tensors(pointer.offset, mask))
    x = pointer.tensor
    size = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    if not ((offset[mask] >= 0) & (offset[mask] < size)).all():
        raise FaultError("a store beyond its tensor")
    torch.as_strided(x, (size,), (1,))[offset[mask]] = value[mask].as_subclass(torch.Tensor)
