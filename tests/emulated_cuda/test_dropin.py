"""generate() with the gate on the emulated card: the CPU's tokens, and no wait of ours beyond those of the prompt."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from accelerate import dispatch_model
from dense_eager import GENERATE
from emulated_cuda.budgets import assert_within
from emulated_cuda.device import EmulatedCuda
from gated_prompts import TWO
from torch import Tensor

import videoanchor_triton as va
from videoanchor_triton.kernels import dispatch

N_TOKENS = 4


def scores_of(tokens: Tensor) -> Tensor:
    """(N, D) -> (N,) in [0, 1], which another order of sums does not change much."""
    x = tokens.float().sum(-1)
    return (x - x.min()) / (x.max() - x.min()).clamp(min=1e-5)


CONFIG = va.VideoAnchorConfig(alpha_k=4.0, alpha_v=2.0, scorer=scores_of)


class Mode(NamedTuple):
    """A way of generating: its options, whether for one row only, and what its prompt may cost."""

    options: dict[str, Any]
    prompt: str
    one_row: bool = False


MODES = {
    "dynamic": Mode({}, "generate: prompt, two rows"),
    "static": Mode({"cache_implementation": "static", "disable_compile": True}, "generate: prompt, two rows"),
    "chunked": Mode({"prefill_chunk_size": 5}, "generate: prompt in chunks, two rows"),
    "beams": Mode({"num_beams": 2}, "generate: prompt, two rows of two beams"),
    "lookup": Mode({"prompt_lookup_num_tokens": 2}, "generate: prompt, one padded row", one_row=True),
    "assistant": Mode({"assistant_model": None}, "generate: prompt, one padded row", one_row=True),
}


class Backbone(NamedTuple):
    """A tiny model, and another that drafts for it, on the CPU and on the card."""

    name: str
    cpu: tuple[Any, Any]
    card: tuple[Any, Any]


@pytest.fixture(scope="module", params=tiny.BACKBONES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    models = []
    for seed in (0, 3):
        model = tiny.build(request.param, seed=seed, num_hidden_layers=2)
        model.generation_config.assistant_confidence_threshold = 0.0  # it indexes by a Python list, see device.py
        models.append(model)
    return Backbone(request.param, tuple(models), tuple(copy.deepcopy(model).to("cuda") for model in models))


@pytest.fixture
def on_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by torch instead of in Triton's interpreter, which is slow."""
    monkeypatch.setattr(dispatch, "triton_refusal", lambda *_: "the kernels are not the point of this test")


def prompt(name: str, *, one_row: bool) -> dict[str, Tensor]:
    """Two left-padded rows, or one that repeats itself."""
    if not one_row:
        return tiny.inputs(name, TWO)
    batch = tiny.inputs(name, [[3, 4, 5, "V", 3, 4, 5, 3, 4]])
    shape = batch["input_ids"].shape
    return {key: F.pad(x, (1, 0), value=tiny.PAD * (key == "input_ids")) if x.shape == shape else x
            for key, x in batch.items()}  # fmt: skip


@contextmanager
def passes_of(model: Any, after_prompt: Callable[[], None], n_chunks: int) -> Iterator[list[int]]:
    """How many positions each pass of the language model gets; `after_prompt` is called after so many passes."""
    lengths: list[int] = []

    def passed(_module: Any, _args: Any, inputs: dict[str, Any], _output: Any) -> None:
        lengths.append(inputs["inputs_embeds"].shape[1])
        if len(lengths) == n_chunks:
            after_prompt()

    hook = model.base_model.language_model.register_forward_hook(passed, with_kwargs=True)
    yield lengths
    hook.remove()


def generate(models: tuple[Any, Any], batch: dict[str, Tensor], options: dict[str, Any]) -> Any:
    model, assistant = models
    if "assistant_model" in options:
        options = {**options, "assistant_model": assistant}
    return model.generate(**batch, **{**GENERATE, "max_new_tokens": N_TOKENS, **options})


def compare(name: str, cpu: tuple[Any, Any], on_card: tuple[Any, Any], mode: str, card: EmulatedCuda) -> list[int]:
    """Assert that the card's tokens are the CPU's and that waits stay within the table; the lengths of its passes after
    the prompt."""
    options, budget, one_row = MODES[mode]
    batch = prompt(name, one_row=one_row)
    with va.enable(cpu[0], CONFIG):
        expected = generate(cpu, batch, options)
    ungated = generate(cpu, batch, options)
    assert not torch.equal(expected.logits[0], ungated.logits[0]), "the gate must show"

    def prompt_is_done() -> None:
        assert_within(card, budget)
        card.reset()

    model = on_card[0]
    batch = {key: value.to(model.device) for key, value in batch.items()}
    chunks = -(-batch["input_ids"].shape[1] // 5) if mode == "chunked" else 1
    with va.enable(model, CONFIG) as handle, passes_of(model, prompt_is_done, chunks) as lengths:
        card.reset()
        out = generate(on_card, batch, options)
    assert_within(card, "generate: decoding step")
    assert torch.equal(out.sequences.cpu(), expected.sequences)
    assert all(result is not None and result.scores.is_cuda for result in handle.last)
    assert len(lengths) > chunks
    return lengths[chunks:]


@pytest.mark.usefixtures("on_sdpa")
@pytest.mark.parametrize("mode", MODES)
def test_the_tokens_are_those_of_the_cpu_and_no_step_waits(backbone: Backbone, mode: str, card: EmulatedCuda) -> None:
    steps = compare(*backbone, mode, card)
    assert mode != "assistant" or max(steps) > 1, "a model of its own drafts for each step"


@pytest.mark.parametrize("backbone", ["internvl"], indirect=True)
def test_the_kernels_take_the_drop_ins_calls(backbone: Backbone, card: EmulatedCuda) -> None:
    compare(*backbone, "static", card)
    assert card.launches


@pytest.mark.usefixtures("on_sdpa")
@pytest.mark.parametrize("spread", [False, True], ids=["whole", "spread"])
def test_a_second_card(spread: bool, two_cards: EmulatedCuda) -> None:
    """The whole model on a card that is not the current one, and a model spread over both as by `device_map`."""
    cpu = tiny.build("qwen2_5_vl", num_hidden_layers=2)
    model = copy.deepcopy(cpu)
    if spread:
        text = "model.language_model"
        first = ("model.visual", f"{text}.embed_tokens", f"{text}.layers.0", f"{text}.rotary_emb")
        second = (f"{text}.layers.1", f"{text}.norm", "lm_head")
        model = dispatch_model(model, {**dict.fromkeys(first, 0), **dict.fromkeys(second, 1)})
    else:
        model.to("cuda:1")
    assert {x.device.index for x in model.parameters()} == ({0, 1} if spread else {1})
    compare("qwen2_5_vl", (cpu, None), (model, None), "dynamic", two_cards)
    assert two_cards.current == 0
