"""What once ran ungated, or wrongly gated, without a word: each is right now, or raises one sentence."""

import copy
import inspect
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models as tiny
import torch
from dense_eager import ALPHA_K, ALPHA_V, GENERATE, assert_same, build, generate_dense, merged_scores, pseudo_scores
from torch import Tensor
from transformers import DynamicCache, StaticCache

import videoanchor_triton as va
from videoanchor_triton.integrations.transformers.visual_tokens import find_multimodal_model

CONFIG = va.VideoAnchorConfig(alpha_k=ALPHA_K, alpha_v=ALPHA_V, scorer=pseudo_scores)
PREFILL = va.VideoAnchorConfig(alpha_k=ALPHA_K, alpha_v=ALPHA_V, scorer=pseudo_scores, decode="prefill")
ONE = [[3, 4, "V", 5, 6]]
TWO = [[3, 4, "V", 5], [7, 8, "V", 9, 10, 11, 12]]
v5 = pytest.mark.skipif(not tiny.V5, reason="transformers 4.57 cannot prefill a video in chunks")


@pytest.fixture(params=tiny.BACKBONES)
def backbone(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, build(request.param)


@pytest.fixture
def internvl() -> tuple[Any, dict[str, Tensor]]:
    return build("internvl"), tiny.inputs("internvl", ONE)


def merged_embeddings(model: Any, batch: dict[str, Tensor]) -> Tensor:
    merged: list[Tensor] = []
    hook = model.base_model.language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: merged.append(kwargs["inputs_embeds"].clone()), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch, use_cache=False)
    hook.remove()
    return merged[0]


def text_after(batch: dict[str, Tensor], n: int = 3) -> dict[str, Any]:
    """A text step of n tokens after a prompt of one row."""
    length = batch["input_ids"].shape[1]
    step: dict[str, Any] = {"input_ids": torch.arange(20, 20 + n)[None], "use_cache": True}
    return step if tiny.V5 else {**step, "cache_position": torch.arange(length, length + n)}


# Passes that no hook could gate


def test_another_attention_set_while_enabled(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    with va.enable(model, CONFIG):
        model.set_attn_implementation("sdpa")
        with pytest.raises(RuntimeError, match="set to 'sdpa' while VideoAnchor is enabled"):
            model.generate(**tiny.inputs(name, ONE), **GENERATE)


def test_language_model_called_by_itself(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    batch = tiny.inputs(name, ONE)
    embeds, scores = merged_embeddings(model, batch), merged_scores(model, batch)
    text = model.base_model.language_model
    positions = torch.arange(embeds.shape[1])[None]
    with va.enable(model, CONFIG) as handle, torch.no_grad():
        with pytest.raises(RuntimeError, match="called by itself"):
            text(inputs_embeds=embeds)
        with pytest.raises(RuntimeError, match="called by itself"):
            text(inputs_embeds=embeds, position_ids=positions, use_cache=False)
        with handle.use_scores(scores):
            gated = text(inputs_embeds=embeds, use_cache=False).last_hidden_state
    plain = text(inputs_embeds=embeds, use_cache=False).last_hidden_state
    assert (gated - plain).abs().max() > 0.1


@pytest.mark.parametrize("part", ["base", "language-model", "layer"])
def test_forward_called_without_hooks(backbone: tuple[str, Any], part: str) -> None:
    name, model = backbone
    batch, hidden = tiny.inputs(name, ONE), torch.randn(1, 4, 64)
    text = model.base_model.language_model
    positions = torch.arange(4).expand((3, 1, 4) if name.startswith("qwen") else (1, 4))
    layer: dict[str, Any] = {"position_embeddings": text.rotary_emb(hidden, positions), "position_ids": positions}
    calls: dict[str, Callable[[], Any]] = {
        "base": lambda: find_multimodal_model(model).forward(**batch),
        "language-model": lambda: text.forward(inputs_embeds=hidden),
        "layer": lambda: text.layers[0](hidden, **layer),
    }
    calls[part]()
    with va.enable(model, CONFIG), pytest.raises(RuntimeError, match=r"by itself|got no gate"):
        calls[part]()


def test_pixels_by_position(internvl: tuple[Any, dict[str, Tensor]]) -> None:
    model, batch = internvl
    base = find_multimodal_model(model)
    del batch["attention_mask"]
    with va.enable(model, CONFIG) as handle, torch.no_grad():
        expected = base(**batch, use_cache=False).last_hidden_state
        handle.last = []
        by_position = base(batch["input_ids"], batch["pixel_values"], use_cache=False).last_hidden_state
        assert handle.last[0] is not None
    torch.testing.assert_close(by_position, expected)


def test_features_under_a_name_that_nobody_knows(internvl: tuple[Any, dict[str, Tensor]]) -> None:
    """What the forward encodes is visual, however its pixels are called."""
    model, batch = internvl
    base = find_multimodal_model(model)
    pixels = batch.pop("pixel_values")
    forward = base.forward

    def renamed(*args: Any, frames: Tensor, **kwargs: Any) -> Any:
        return forward(*args, pixel_values=frames, **kwargs)

    with va.enable(model, CONFIG), torch.no_grad():
        expected = base(**batch, pixel_values=pixels, use_cache=False).last_hidden_state
        base.forward = renamed
        out = base(**batch, frames=pixels, use_cache=False).last_hidden_state
        del base.forward
    torch.testing.assert_close(out, expected)


# Caches


def test_cache_prefilled_before_enable(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    batch = tiny.inputs(name, ONE)
    with torch.no_grad():
        cache = model(**batch, past_key_values=DynamicCache(), use_cache=True).past_key_values
        with va.enable(model, CONFIG), pytest.raises(RuntimeError, match="not filled with VideoAnchor enabled"):
            model(**text_after(batch), past_key_values=cache)


def test_cache_rebuilt_from_its_tensors(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    batch = tiny.inputs(name, ONE)
    with va.enable(model, CONFIG), torch.no_grad():
        cache = model(**batch, past_key_values=DynamicCache(), use_cache=True).past_key_values
        rebuilt = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
        with pytest.raises(RuntimeError, match="rebuilt from its tensors"):
            model(**text_after(batch), past_key_values=rebuilt)


def test_scores_for_a_cache_that_has_none(internvl: tuple[Any, dict[str, Tensor]]) -> None:
    """use_scores says what the positions of a rebuilt cache are, for a step of any length."""
    model, batch = internvl
    scores = merged_scores(model, batch)
    with va.enable(model, CONFIG) as handle, torch.no_grad():
        cache = model(**batch, past_key_values=DynamicCache(), use_cache=True).past_key_values
        for n in (1, 3):
            rebuilt = DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in cache.layers])
            step = text_after(batch, n)
            expected = model(**step, past_key_values=copy.deepcopy(cache)).logits
            with handle.use_scores(scores):
                out = model(**step, past_key_values=rebuilt).logits
            torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("stored", [False, True], ids=["same", "pickled"])
def test_gated_cache_continued_after_the_block(backbone: tuple[str, Any], stored: bool) -> None:
    name, model = backbone
    batch = tiny.inputs(name, ONE)
    with torch.no_grad():
        with va.enable(model, CONFIG):
            cache = model(**batch, past_key_values=DynamicCache(), use_cache=True).past_key_values
            expected = model(**text_after(batch), past_key_values=copy.deepcopy(cache)).logits
        if stored:
            cache = pickle.loads(pickle.dumps(cache))
        with pytest.raises(RuntimeError, match="has none: continue it within"):
            model(**text_after(batch), past_key_values=copy.deepcopy(cache))
        with va.enable(model, CONFIG):
            out = model(**text_after(batch), past_key_values=cache).logits
    torch.testing.assert_close(out, expected)


def test_cache_of_text_that_went_on_without_the_gate(internvl: tuple[Any, dict[str, Tensor]]) -> None:
    """Text may go on anywhere; but what came without the gate may have been a video."""
    model, batch = internvl
    text = {"input_ids": torch.arange(3, 9)[None]}
    with torch.no_grad():
        with va.enable(model, CONFIG):
            cache = model(**text, past_key_values=DynamicCache(), use_cache=True).past_key_values
        positions = {"position_ids": torch.arange(6, 6 + batch["input_ids"].shape[1])[None]}
        if not tiny.V5:
            positions["cache_position"] = positions["position_ids"][0]
        batch["attention_mask"] = torch.ones(1, 6 + batch["input_ids"].shape[1], dtype=torch.long)
        model(**batch, **positions, past_key_values=cache, use_cache=True)
        with va.enable(model, CONFIG), pytest.raises(RuntimeError, match="not filled with VideoAnchor enabled"):
            model(input_ids=torch.tensor([[20]]), past_key_values=cache, use_cache=True)


def test_second_turn_of_merged_embeddings(internvl: tuple[Any, dict[str, Tensor]]) -> None:
    model, batch = internvl
    embeds = merged_embeddings(model, batch)
    with va.enable(model, CONFIG), torch.no_grad():
        cache = model(**batch, past_key_values=DynamicCache(), use_cache=True).past_key_values
        n = embeds.shape[1]
        extra = {} if tiny.V5 else {"cache_position": torch.arange(n, 2 * n)}
        with pytest.raises(ValueError, match="use_scores"):
            model(inputs_embeds=embeds, past_key_values=cache, use_cache=True, **extra)


def test_reset_forgets_the_scores(backbone: tuple[str, Any]) -> None:
    """A prompt of one token after a reset is not gated by the prompt before it."""
    name, model = backbone
    batch = tiny.inputs(name, ONE)
    one = {"input_ids": torch.tensor([[20]]), "use_cache": True}
    if name.startswith("qwen"):
        one["position_ids"] = torch.zeros(3, 1, 1, dtype=torch.long)
    if not tiny.V5:
        one["cache_position"] = torch.tensor([0])
    text = model.config.get_text_config()
    with va.enable(model, CONFIG), torch.no_grad():
        cache = StaticCache(config=text, max_cache_len=40)
        model(**batch, past_key_values=cache, use_cache=True)
        cache.reset()
        out = model(**one, past_key_values=cache).logits
        expected = model(**one, past_key_values=StaticCache(config=text, max_cache_len=40)).logits
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_crop_and_growth_behind_a_pass(internvl: tuple[Any, dict[str, Tensor]]) -> None:
    model, batch = internvl
    with va.enable(model, CONFIG), torch.no_grad():
        cache = model(**batch, past_key_values=DynamicCache(), use_cache=True).past_key_values
        held = cache.videoanchor_scores.scores
        cache.crop(7 if not tiny.V5 else 7 - batch["input_ids"].shape[1])
        assert cache.videoanchor_scores.scores.shape[1] == 7
        assert torch.equal(cache.videoanchor_scores.scores, held[:, :7])


# Passes of one token


@v5
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("prompts", [ONE, TWO], ids=["one", "two"])
def test_chunks_of_one_token(backbone: tuple[str, Any], prompts: list[tiny.Prompt], static: bool) -> None:
    name, model = backbone
    batch = tiny.inputs(name, prompts)
    expected = generate_dense(model, batch, merged_scores(model, batch))
    options: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True} if static else {}
    with va.enable(model, CONFIG):
        out = model.generate(**batch, **GENERATE, prefill_chunk_size=1, **options)
    assert_same(out, expected)


@v5
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_last_chunk_of_one_token_belongs_to_the_prompt(backbone: tuple[str, Any], static: bool) -> None:
    name, model = backbone
    batch = tiny.inputs(name, ONE)
    n = batch["input_ids"].shape[1]
    expected = generate_dense(model, batch, merged_scores(model, batch), "prefill")
    options: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True} if static else {}
    for chunk in (1, n - 1):
        with va.enable(model, PREFILL):
            out = model.generate(**batch, **GENERATE, prefill_chunk_size=chunk, **options)
        assert_same(out, expected)


def test_given_scores_with_a_static_cache(internvl: tuple[Any, dict[str, Tensor]]) -> None:
    model, batch = internvl
    scores = torch.rand(batch["input_ids"].shape)
    expected = generate_dense(model, batch, scores)
    chunks = (None, 1, 4) if tiny.V5 else (None,)
    for chunk in chunks:
        with va.enable(model, CONFIG) as handle, handle.use_scores(scores):
            out = model.generate(
                **batch, **GENERATE, cache_implementation="static", disable_compile=True, prefill_chunk_size=chunk
            )
        assert_same(out, expected)


# Ways of generating


@v5
def test_chunks_for_a_model_enabled_in_part(backbone: tuple[str, Any]) -> None:
    name, model = backbone
    batch = tiny.inputs(name, ONE)
    with va.enable(model.base_model, CONFIG):
        with pytest.raises(RuntimeError, match="enable the model whose generate"):
            model.generate(**batch, **GENERATE, prefill_chunk_size=5)
        whole = model.generate(**batch, **GENERATE)
    assert_same(whole, generate_dense(model, batch, merged_scores(model, batch)))


@v5
def test_chunks_of_features_at_other_tokens_are_refused() -> None:
    """GLM-4V's video stands at image tokens, by which transformers does not cut it: it would lose it."""
    model = build("glm4v")
    batch = tiny.inputs("glm4v", ONE)
    with va.enable(model, CONFIG), pytest.raises(NotImplementedError, match="leave prefill_chunk_size out"):
        model.generate(**batch, **GENERATE, prefill_chunk_size=5)


@pytest.mark.parametrize(
    "option",
    [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}, {"use_mtp": True}, {"use_cache": False}],
    ids=lambda option: next(iter(option)),
)
def test_gate_in_the_prompt_only_refuses(internvl: tuple[Any, dict[str, Tensor]], option: dict[str, Any]) -> None:
    model, batch = internvl
    with va.enable(model, PREFILL), pytest.raises(NotImplementedError, match='decode="prefill"'):
        model.generate(**batch, **GENERATE, **option)


def test_prompt_of_several_tokens_after_a_kept_cache_is_gated_in_prefill_mode(backbone: tuple[str, Any]) -> None:
    """A second turn of one token is a prompt, too."""
    name, model = backbone
    batch = tiny.inputs(name, ONE)
    n = batch["input_ids"].shape[1]
    prefix = {
        key: value[:, : n - 1] if value.shape == batch["input_ids"].shape else value for key, value in batch.items()
    }
    rest = {key: value for key, value in batch.items() if not key.startswith("pixel")}
    expected = generate_dense(model, batch, merged_scores(model, batch), "prefill")
    with va.enable(model, PREFILL), torch.no_grad():
        cache = model(**prefix, past_key_values=DynamicCache(), use_cache=True).past_key_values
        out = model.generate(**rest, **GENERATE, past_key_values=cache)
    assert_same(out, expected)


# State


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("part", ["model", "base"])
def test_copies_of_an_enabled_model(internvl: tuple[Any, Any], copied: Callable[[Any], Any], part: str) -> None:
    model, _ = internvl
    with va.enable(model, CONFIG), pytest.raises(TypeError, match=r"videoanchor_triton\.disable\(model\)"):
        copied(model if part == "model" else model.base_model)
    copied(model)


def test_lost_handle(internvl: tuple[Any, Any]) -> None:
    model, _ = internvl
    va.enable(model, CONFIG)
    va.disable(model)
    va.disable(model)
    va.enable(model, CONFIG).disable()
    assert model.config.text_config._attn_implementation == "sdpa"


def test_disable_that_fails_leaves_the_rest_undone(
    internvl: tuple[Any, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = internvl
    handle = va.enable(model, CONFIG)

    def failing(_implementation: object) -> None:
        raise RuntimeError("no such attention")

    monkeypatch.setattr(model, "set_attn_implementation", failing)
    with pytest.raises(RuntimeError, match="no such attention"):
        handle.disable()
    monkeypatch.undo()
    assert "generate" not in vars(model)
    assert not model.base_model._forward_pre_hooks
    assert inspect.ismethod(model.base_model.get_image_features)
    with va.enable(model, CONFIG):
        model.generate(**batch, **GENERATE)


def test_nested_given_scores(internvl: tuple[Any, dict[str, Tensor]]) -> None:
    model, batch = internvl
    outer, inner = torch.rand(batch["input_ids"].shape), torch.rand(batch["input_ids"].shape)
    expected = {key: generate_dense(model, batch, scores) for key, scores in (("outer", outer), ("inner", inner))}
    with va.enable(model, CONFIG) as handle, handle.use_scores(outer):
        with handle.use_scores(inner):
            assert_same(model.generate(**batch, **GENERATE), expected["inner"])
        assert_same(model.generate(**batch, **GENERATE), expected["outer"])


def test_given_scores_reach_a_thread_of_the_block(internvl: tuple[Any, dict[str, Tensor]]) -> None:
    """As a streamer's generate() runs; not a thread that ran before."""
    model, batch = internvl
    scores = torch.rand(batch["input_ids"].shape)
    expected, own = generate_dense(model, batch, scores), generate_dense(model, batch, merged_scores(model, batch))
    out: dict[str, Any] = {}
    opened, done = threading.Event(), threading.Event()

    def run(name: str) -> None:
        if name == "older":
            opened.wait(60)
        out[name] = model.generate(**batch, **GENERATE)
        done.set()

    older = threading.Thread(target=run, args=("older",))
    older.start()
    with va.enable(model, CONFIG) as handle, handle.use_scores(scores):
        streamer = threading.Thread(target=run, args=("streamer",))
        streamer.start()
        streamer.join()
        opened.set()
        older.join()
    assert_same(out["streamer"], expected)
    assert_same(out["older"], own)


def test_thread_that_two_blocks_may_have_started(internvl: tuple[Any, dict[str, Tensor]]) -> None:
    model, batch = internvl
    scores = torch.rand(batch["input_ids"].shape)
    opened, close = threading.Event(), threading.Event()
    said: list[str] = []

    def other() -> None:
        with handle.use_scores(scores):
            opened.set()
            close.wait(60)

    def third() -> None:
        try:
            model.generate(**batch, **GENERATE)
        except RuntimeError as error:
            said.append(str(error))

    with va.enable(model, CONFIG) as handle, handle.use_scores(scores):
        threads = [threading.Thread(target=other)]
        threads[0].start()
        opened.wait(60)
        threads.append(threading.Thread(target=third))
        threads[1].start()
        threads[1].join()
        close.set()
        threads[0].join()
    assert len(said) == 1
    assert "several threads" in said[0]


def test_last_is_of_the_last_prompt(internvl: tuple[Any, dict[str, Tensor]]) -> None:
    model, batch = internvl
    text = tiny.inputs("internvl", [[3, 4, 5]])
    with va.enable(model, CONFIG) as handle, torch.no_grad():
        for prompt in (model.generate, model):
            model.generate(**batch, **GENERATE)
            assert handle.last[0] is not None
            prompt(**text)
            assert handle.last == []
            model(**batch)
            assert handle.last[0] is not None
            with handle.use_scores(torch.zeros(batch["input_ids"].shape)):
                prompt(**batch)
            assert handle.last == []
