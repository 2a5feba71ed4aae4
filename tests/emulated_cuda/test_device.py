"""The emulated card itself: its rules, its counts, its graphs."""

import importlib
import threading

import pytest
import torch
from emulated_cuda.device import EmulatedCuda

LINE = "tests/emulated_cuda/test_device.py"


def test_devices_do_not_mix(two_cards: EmulatedCuda) -> None:
    x = torch.ones(2, 2, device="cuda")
    assert x.device == torch.device("cuda", 0)
    assert torch.cuda.device_count() == two_cards.devices == 2
    for other in (torch.ones(2, 2), torch.ones(2, 2, device="cuda:1")):
        with pytest.raises(RuntimeError, match="at least two devices"):
            _ = x @ other
    assert torch.equal((x * torch.tensor(2.0)).cpu(), torch.full((2, 2), 2.0))
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        x.to("cuda:2")
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    with pytest.raises(RuntimeError, match="mm_cuda"):
        _ = x.long() @ x.long()
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(2, device="cuda", generator=torch.Generator())
    assert torch.rand(2, device="cuda", generator=torch.Generator("cuda")).is_cuda


def test_a_default_device(two_cards: EmulatedCuda) -> None:  # noqa: ARG001
    for device in (torch.device("meta"), torch.device("cuda", 1)):
        with device:
            assert torch.tensor([1.0]).device == torch.as_tensor([1.0]).device == torch.zeros(1).device == device
            assert torch.tensor([1.0], device="cpu").device.type == "cpu"
    assert torch.tensor([1.0]).device.type == "cpu"


def test_waits_are_counted_by_line(card: EmulatedCuda) -> None:
    x = torch.arange(6.0).to("cuda")
    x.sum().item()
    _ = x[x > 2]
    x.to("cpu", non_blocking=True)
    torch.arange(6.0).pin_memory().to("cuda", non_blocking=True)
    assert x[[1, 2]].tolist() == x[range(1, 3)].tolist() == [1, 2]
    assert [what for what, _ in card.reads] == ["item", "index by a mask", "to cpu"]
    assert [what for what, _ in card.uploads] == ["upload", "upload"]
    assert all(line.startswith(LINE) for _, line in (*card.reads, *card.uploads))


def test_a_thread_is_on_the_card_too(card: EmulatedCuda) -> None:
    made = []
    thread = threading.Thread(target=lambda: made.append(torch.zeros(2, device="cuda").sum().item()))
    thread.start()
    thread.join()
    assert made == [0.0]
    assert card.reads.total() == 1


def test_a_graph_replays_and_refuses_to_wait(card: EmulatedCuda) -> None:
    x, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = 2 * x
        y += 1
    x.fill_(4)
    graph.replay()
    assert y.tolist() == [9, 9, 9]
    for waits in (lambda: x.sum().item(), lambda: x.add_(torch.ones(3).to("cuda")), torch.cuda.synchronize):
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), torch.cuda.graph(graph):
            waits()
    assert not torch.cuda.is_current_stream_capturing()
    assert card.captured is None


def test_the_time_of_an_event_needs_a_wait(two_cards: EmulatedCuda) -> None:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    last.record()
    with pytest.raises(RuntimeError, match="not ready"):
        first.elapsed_time(last)
    last.synchronize()
    assert first.elapsed_time(last) >= 0
    assert two_cards.reads.total() == 1
    with torch.cuda.device("cuda:1"):
        last.record()
    with pytest.raises(RuntimeError, match="invalid resource handle"):
        first.elapsed_time(last)


class OnTheCard:
    """An array of another library, in the memory of a card."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.x.__dlpack_device__()

    def __dlpack__(self, *, stream: int) -> object:
        return self.x.__dlpack__(stream=stream)


@pytest.mark.parametrize("module", ["torch", "torch.utils.dlpack"])
def test_dlpack_shares_memory_and_keeps_the_card(module: str, two_cards: EmulatedCuda) -> None:  # noqa: ARG001
    x = torch.arange(3.0).to("cuda:1")
    assert x.__dlpack_device__() == (2, 1)
    same = importlib.import_module(module).from_dlpack(OnTheCard(x))
    assert same.device == x.device
    x += 1
    assert same.tolist() == [1, 2, 3]
    assert torch.from_dlpack(torch.arange(3.0)).device.type == "cpu"
    with pytest.raises(BufferError, match="gradient"):
        x.requires_grad_().__dlpack__()
