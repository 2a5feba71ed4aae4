"""Tiny random checkpoints in their original layout give the same logits after the conversion."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import original_models as original
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from transformers.generation import utils as generation

import videoanchor_triton as va
from videoanchor_triton.integrations import cli, pipeline
from videoanchor_triton.integrations.convert.conversion import convert_checkpoint
from videoanchor_triton.integrations.convert.llava import VISION_TOWERS, insert_grid_newlines
from videoanchor_triton.integrations.errors import InputError
from videoanchor_triton.integrations.token_grid import TokenGrid
from videoanchor_triton.integrations.video.reader import write_video

SIZE = original.IMAGE


@pytest.fixture(autouse=True)
def _tiny_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VISION_TOWERS, "tiny", original.TOWER)


def internvl(folder: Path, config: dict[str, Any] | None = None, n_shards: int = 1) -> Any:
    """Writes a tiny InternVL2 as published and returns the model."""
    config = config or original.internvl_config()
    folder.mkdir(parents=True)
    model: Any = original.randomise(original.InternVLChat(config))
    state = model.state_dict()
    if config["llm_config"]["tie_word_embeddings"]:
        del state["language_model.lm_head.weight"]
    original.write_weights(folder, state, n_shards)
    original.write_json(folder / "config.json", config)
    if config["llm_config"]["architectures"] == ["InternLM2ForCausalLM"]:
        original.write_internlm2_tokenizer(folder)
    else:
        original.write_qwen2_tokenizer(folder, internvl=True)
    return model


def llava(folder: Path, config: dict[str, Any], n_shards: int = 1) -> Any:
    folder.mkdir(parents=True)
    model: Any = original.randomise(original.LlavaVideo(config, original.TOWER))
    original.write_weights(folder, model.original_state(), n_shards)
    original.write_json(folder / "config.json", config)
    original.write_qwen2_tokenizer(folder, internvl=False)
    return model


def load(folder: Path) -> Any:
    options = {"output_loading_info": True, "attn_implementation": "eager"}
    loaded: Any = hf.AutoModelForImageTextToText.from_pretrained(folder, **options)
    model, report = loaded
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def pixels(n: int, size: int = SIZE) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(3))


def internvl_logits(source: Any, converted: Any, n_images: int, n_text: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    context = converted.config.image_token_id
    text = torch.randint(3, 30, (n_text,), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([text[:2], *[torch.tensor([40 + i, *[context] * 4]) for i in range(n_images)], text[2:]])[None]
    with torch.inference_mode():
        expected = source(ids, pixels(n_images), context)
        return expected, converted(input_ids=ids, pixel_values=pixels(n_images)).logits


INTERNVL = {
    "internlm2-gqa": {},
    "internlm2-mha": {"num_key_value_heads": 4},
    "internlm2-mqa": {"num_key_value_heads": 1},
    "internlm2-bias": {"bias": True},
    "internlm2-plain-rope": {"rope_scaling": None},
    "vit-6b-qk-norm": {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False},
    "qwen2": {"architecture": "Qwen2ForCausalLM"},
    "qwen2-tied": {"architecture": "Qwen2ForCausalLM", "tie_word_embeddings": True},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "template": "internvl2_5"},
    "llama": {"architecture": "LlamaForCausalLM", "template": "Hermes-2"},
}


@pytest.mark.parametrize("changes", INTERNVL.values(), ids=INTERNVL.keys())
def test_internvl_logits(changes: dict[str, Any], tmp_path: Path) -> None:
    source = internvl(tmp_path / "source", original.internvl_config(**changes))
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    expected, got = internvl_logits(source, load(tmp_path / "out"), n_images=3)
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_dynamic_rope_past_the_trained_length(tmp_path: Path) -> None:
    source = internvl(tmp_path / "source", original.internvl_config(max_position_embeddings=16))
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    converted = load(tmp_path / "out")
    for n_text in (3, 40):  # 13 tokens and 50
        expected, got = internvl_logits(source, converted, n_images=2, n_text=n_text)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("newline", ["grid", "one_token"])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}], ids=["gqa", "mha"])
def test_llava_video_logits(newline: str, changes: dict[str, Any], tmp_path: Path) -> None:
    source = llava(tmp_path / "source", original.llava_config(mm_newline_position=newline, **changes), n_shards=3)
    report = convert_checkpoint(tmp_path / "source", tmp_path / "out")
    assert bool(report.notes) == (newline == "grid")
    converted = load(tmp_path / "out")
    before, after, frames = [3, 4, 5], [6, 7, 8, 9], pixels(2, 20)
    ids = torch.tensor([[*before, *[converted.config.video_token_index] * (2 * 9 + 1), *after]])
    if newline == "grid":
        ids = insert_grid_newlines(ids, converted.config)
        assert ids.shape[1] == 3 + 2 * 3 * 4 + 4
    with torch.inference_mode():
        expected = source(before, frames, after)
        got = converted(input_ids=ids, pixel_values_videos=frames[None]).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_llava_video_image_logits(tmp_path: Path) -> None:
    source = llava(tmp_path / "source", original.llava_config())
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    converted = load(tmp_path / "out")
    ids = torch.tensor([[3, 4, *[converted.config.image_token_index] * (25 + 30), 5]])
    with torch.inference_mode():
        got = converted(input_ids=ids, pixel_values=pixels(2, 20)[None], image_sizes=torch.tensor([[20, 20]])).logits
        torch.testing.assert_close(got, source.image_logits([3, 4], pixels(2, 20), [5]), atol=1e-4, rtol=0)


def test_tied_llava_logits(tmp_path: Path) -> None:
    config = original.llava_config(mm_newline_position="one_token", tie_word_embeddings=True)
    source = llava(tmp_path / "source", config)
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    converted = load(tmp_path / "out")
    ids = torch.tensor([[3, *[converted.config.video_token_index] * 10, 4]])
    with torch.inference_mode():
        got = converted(input_ids=ids, pixel_values_videos=pixels(1, 20)[None]).logits
        torch.testing.assert_close(got, source([3], pixels(1, 20), [4]), atol=1e-4, rtol=0)


class _Config:
    video_newline_token_index, video_token_index = 9, 8
    vision_config = type("Vision", (), {"image_size": 20, "patch_size": 4})


def test_grid_newlines() -> None:
    ids = torch.tensor([[1, *[8] * 7, 2, *[8] * 4, 3]])
    assert insert_grid_newlines(ids, _Config).tolist() == [[1, 8, 8, 8, 9, 8, 8, 8, 8, 2, 8, 8, 8, 8, 3]]
    with pytest.raises(ValueError, match="6 video tokens are not rows of 3"):
        insert_grid_newlines(torch.tensor([[1, *[8] * 6]]), _Config)
    with pytest.raises(ValueError, match="same number of frames"):
        insert_grid_newlines(torch.tensor([[1, *[8] * 7], [*[8] * 4, 1, 1, 1, 1]]), _Config)
    with pytest.raises(ValueError, match="video_newline_token_index"):
        insert_grid_newlines(ids, object())


def test_shards_keep_their_places_and_bytes(tmp_path: Path) -> None:
    internvl(tmp_path / "one")
    internvl(tmp_path / "three", n_shards=3)
    seen: list[tuple[str, int, int]] = []
    one = convert_checkpoint(tmp_path / "one", tmp_path / "a")
    three = convert_checkpoint(tmp_path / "three", tmp_path / "b", progress=lambda *step: seen.append(step))
    assert (one.n_shards, three.n_shards) == (1, 3)
    assert seen == [("weights", i, 3) for i in range(3)]
    whole = load_file(tmp_path / "a" / "model.safetensors")
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    parts = {name: load_file(tmp_path / "b" / name) for name in sorted(set(index["weight_map"].values()))}
    assert index["weight_map"].keys() == whole.keys()
    assert len(parts) == 3
    for key, name in index["weight_map"].items():
        assert torch.equal(parts[name][key], whole[key])
    assert index["metadata"]["total_size"] == one.n_bytes == three.n_bytes
    assert one.n_bytes == sum(tensor.nbytes for tensor in whole.values())


def test_config_is_written_for_every_transformers(tmp_path: Path) -> None:
    """5 reads the spelling of 4.57, not the other way round."""
    internvl(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert text["rope_scaling"] == {"rope_type": "dynamic", "factor": 2.0}
    assert text["rope_theta"] == 1000.0


def test_dtype_of_the_weights_is_kept(tmp_path: Path) -> None:
    internvl(tmp_path / "source")
    state = load_file(tmp_path / "source" / "model.safetensors")
    original.write_weights(tmp_path / "source", {key: value.bfloat16() for key, value in state.items()})
    report = convert_checkpoint(tmp_path / "source", tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert report.n_bytes == sum(tensor.nbytes for tensor in weights.values())


def test_internlm2_tokenizer(tmp_path: Path) -> None:
    internvl(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "source" / "tokenizer_config.json").read_text())
    for index, entry in config["added_tokens_decoder"].items():
        assert tokenizer.convert_tokens_to_ids(entry["content"]) == int(index)
    text = "<|im_start|>word1 word2\n<img><IMG_CONTEXT></img>é<|im_end|>"
    expected = ["<s>", "<|im_start|>", "word", "1", "▁word", "2", "\n"]
    expected += ["<img>", "<IMG_CONTEXT>", "</img>", "<0xC3>", "<0xA9>", "<|im_end|>"]
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == expected
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "word1 word2\né"


@pytest.mark.parametrize("dummy_prefix", [True, False])
@pytest.mark.parametrize("trim", [True, False])
def test_sentencepiece_models_tokenise_alike(dummy_prefix: bool, trim: bool, tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    from videoanchor_triton.integrations.convert import tokenizer

    corpus = Path(original.__file__).read_text().splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_prefix=str(tmp_path / "bpe"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=trim,
        normalization_rule_name="identity",
        user_defined_symbols=["[UNUSED_1]"],
        minloglevel=2,
    )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "bpe.model"))
    data = (tmp_path / "bpe.model").read_bytes()
    converted = tokenizer._sentencepiece(data, {"add_bos_token": False}, {})
    texts = [line for line in corpus if line.strip()]
    plain = not dummy_prefix and not trim
    for text in [*texts, "  two  spaces ", "你好 é🙂\n x", "\nline\n", " ", *(["a[UNUSED_1] b"] if plain else [])]:
        assert converted.encode(text).ids == reference.encode(text), text


def test_qwen2_tokenizer_is_transformers_own(tmp_path: Path) -> None:
    llava(tmp_path / "source", original.llava_config())
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    converted = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    (tmp_path / "source" / "config.json").unlink()
    own = hf.Qwen2TokenizerFast.from_pretrained(tmp_path / "source")  # pyright: ignore[reportAttributeAccessIssue]
    for text in (
        "word1 word22\n\n  word's e\u0301 <|im_start|>user\nword<|im_end|>",
        " ",
        "",
        "w<|endoftext|>  o r d  ",
    ):
        assert converted(text)["input_ids"] == own(text)["input_ids"]
        assert converted.decode(own(text)["input_ids"]) == own.decode(own(text)["input_ids"])


def test_the_source_is_not_touched(tmp_path: Path) -> None:
    llava(tmp_path / "source", original.llava_config(), n_shards=2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()}
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()} == before


def test_chat_template_of_internvl2(tmp_path: Path) -> None:
    internvl(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "word5"}]}
    prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert prompt.startswith("<|im_start|>system\n你是由上海人工智能实验室")
    assert prompt.endswith("<|im_end|><|im_start|>user\n<video>\nword5<|im_end|><|im_start|>assistant\n")


@pytest.mark.parametrize("kind", ["internvl", "llava"])
def test_run_asks_a_converted_model(kind: str, tmp_path: Path) -> None:
    """Processor, prompt, `enable` and generate, as for any checkpoint."""
    if kind == "internvl":
        internvl(tmp_path / "source", original.internvl_config(max_position_embeddings=2048))
    else:
        llava(tmp_path / "source", original.llava_config(max_position_embeddings=2048))
    assert cli.main(["convert", str(tmp_path / "source"), "--out", str(tmp_path / "model")]) == 0
    frames = np.random.default_rng(0).integers(0, 255, (8, 24, 32, 3), dtype=np.uint8)
    write_video(tmp_path / "clip.mp4", frames, fps=4)
    arguments = ["run", "--model", tmp_path / "model", "--video", tmp_path / "clip.mp4", "--out", tmp_path / "out"]
    options = ["--question", "word5", "--alpha-k", "2", "--alpha-v", "1", "--max-frames", "4"]
    assert cli.main([*map(str, arguments), *options, "--n-clusters", "3", "--max-new-tokens", "2"]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    side, newlines = (2, False) if kind == "internvl" else (3, True)
    assert result["grid"] == {"t": 4, "h": side, "w": side, "n_extra": 0, "row_newlines": newlines}
    assert result["tokens"]["visual"] == 4 * side * (side + newlines)


@pytest.mark.parametrize("chunk", [None, 5], ids=["whole", "chunked"])
def test_newlines_of_llava_video_are_scored(chunk: int | None, tmp_path: Path) -> None:
    """As the authors have them: visual tokens, by the embedding of the newline."""
    if chunk is not None and not hasattr(generation, "_slice_mm_encoder_output"):
        pytest.skip("transformers 4.57 cannot prefill a video in chunks")
    llava(tmp_path / "source", original.llava_config())
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    model = load(tmp_path / "out")
    ids = torch.tensor([[3, 4, *[model.config.video_token_index] * (2 * 9 + 1), 5]])
    ids = insert_grid_newlines(ids, model.config)
    seen: list[torch.Tensor] = []

    def scorer(tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tokens)
        return torch.rand(len(tokens))

    with va.enable(model, va.VideoAnchorConfig(alpha_k=1.0, alpha_v=1.0, scorer=scorer)):
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            pixel_values_videos=pixels(2, 20)[None],
            max_new_tokens=2,
            prefill_chunk_size=chunk,
        )
    (tokens,) = seen
    assert len(tokens) == 2 * 3 * 4
    newline = model.get_input_embeddings().weight[model.config.video_newline_token_index]
    assert [i for i, token in enumerate(tokens) if torch.equal(token, newline)] == list(range(3, 24, 4))
    arranged = TokenGrid(2, 3, 3, row_newlines=True).arrange(np.arange(24))
    assert arranged[1].tolist() == [[12, 13, 14], [16, 17, 18], [20, 21, 22]]


@pytest.mark.parametrize("kind", ["internvl", "llava"])
def test_frames_are_normalised_as_in_the_original(kind: str, tmp_path: Path) -> None:
    if kind == "internvl":
        internvl(tmp_path / "source")
        key, mean, std, size = "pixel_values", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], SIZE
    else:
        llava(tmp_path / "source", original.llava_config())
        key, mean, std, size = "pixel_values_videos", [0.5] * 3, [0.5] * 3, 20
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    processor = hf.AutoProcessor.from_pretrained(tmp_path / "out")
    frames = torch.full((1, 3, 24, 32), 51, dtype=torch.uint8)
    inputs = processor(text=["<video>\nword1"], videos=[frames], do_sample_frames=False, return_tensors="pt")
    values = inputs[key].reshape(3, -1)
    assert values.shape[1] == size * size
    expected = (0.2 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(values, expected[:, None].expand_as(values), atol=1e-5, rtol=0)
    prompt = processor.tokenizer.decode(inputs["input_ids"][0])
    visual = "Frame1: <img>" + "<IMG_CONTEXT>" * 4 + "</img>" if kind == "internvl" else "<video>" * 10
    assert f"{visual}\nword1" in prompt


def test_the_gate_changes_a_converted_model(tmp_path: Path) -> None:
    internvl(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    model: Any = pipeline.load(str(tmp_path / "out"), "cpu")[0]
    context = model.config.image_token_id
    ids = torch.tensor([[1, 5, *[context] * 12, 7, 8]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels(3)}
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    plain = model.generate(**batch, **options, output_logits=True)
    config = va.VideoAnchorConfig(alpha_k=4.0, alpha_v=3.0, n_clusters=3)
    with va.enable(model, config) as handle:
        gated = model.generate(**batch, **options, output_logits=True)
        scored = handle.last[0]
    assert scored is not None
    assert scored.scores.shape == (12,)
    assert (gated.logits[0] - plain.logits[0]).abs().max() > 1e-3


def refused(source: Path, out: Path, match: str) -> None:
    """InputError, and nothing left where the output would have been."""
    before = set(out.parent.iterdir())
    with pytest.raises(InputError, match=match):
        convert_checkpoint(source, out)
    assert set(out.parent.iterdir()) == before


def edit(path: Path, **entries: Any) -> None:
    content = json.loads(path.read_text())
    content.update(entries)
    path.write_text(json.dumps(content))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    internvl(tmp_path / "source", n_shards=2)
    return tmp_path / "source"


def test_pickles_are_not_read(source: Path, tmp_path: Path) -> None:
    for path in source.glob("model*"):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refused(source, tmp_path / "out", "pickled weights")
    (source / "pytorch_model.bin").unlink()
    refused(source, tmp_path / "out", "no model.safetensors")


def test_truncated_shard(source: Path, tmp_path: Path) -> None:
    path = sorted(source.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-10])
    refused(source, tmp_path / "out", "damaged or cut short")


def test_missing_shard(source: Path, tmp_path: Path) -> None:
    sorted(source.glob("*.safetensors"))[1].unlink()
    refused(source, tmp_path / "out", "the download is not whole")


def test_index_lists_a_tensor_that_is_nowhere(source: Path, tmp_path: Path) -> None:
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(iter(index.values()))
    edit(source / "model.safetensors.index.json", weight_map={**index, "somewhere.weight": name})
    refused(source, tmp_path / "out", r"no shard holds \(somewhere.weight\)")


def test_index_does_not_lead_outside_the_folder(source: Path, tmp_path: Path) -> None:
    shard = sorted(source.glob("*.safetensors"))[0]
    shard.rename(tmp_path / "elsewhere.safetensors")
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    moved = {key: "../elsewhere.safetensors" if name == shard.name else name for key, name in index.items()}
    edit(source / "model.safetensors.index.json", weight_map=moved)
    refused(source, tmp_path / "out", "which is not in")


def test_missing_unknown_and_misshapen_tensors(tmp_path: Path) -> None:
    model = internvl(tmp_path / "source")
    folder, state = tmp_path / "source", model.state_dict()
    key = "language_model.model.layers.1.attention.wqkv.weight"
    without = {name: tensor for name, tensor in state.items() if name != key}
    original.write_weights(folder, without)
    refused(folder, tmp_path / "out", r"lacks 3 of \d+ tensors \(.*layers.1.self_attn.k_proj")
    original.write_weights(folder, {**state, "language_model.model.layers.0.adapter": torch.ones(1)})
    refused(folder, tmp_path / "out", "unknown tensor language_model.model.layers.0.adapter")
    original.write_weights(folder, {**state, key.replace("layers.1", "layers.2"): state[key]})
    refused(folder, tmp_path / "out", "no place for .*layers.2")
    original.write_weights(folder, {**without, key: state[key][:-1]})
    refused(folder, tmp_path / "out", "does not fit config.json")
    norm = "language_model.model.norm.weight"
    original.write_weights(folder, {**state, norm: state[norm][:-1]})
    refused(folder, tmp_path / "out", "asks for shape")
    original.write_weights(folder, {**state, norm: torch.ones(32, dtype=torch.int8)})
    refused(folder, tmp_path / "out", "stored as I8")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "qwen2_5_vl"}, "model_type 'qwen2_5_vl'.*needs no conversion"),
        ({"ps_version": "v1"}, "ps_version"),
        ({"select_layer": -4}, "select_layer"),
        ({"force_image_size": 8}, "force_image_size"),
        ({"use_llm_lora": 16}, "use_llm_lora"),
        ({"template": "phi3-chat"}, "template 'phi3-chat'"),
        ({"llm_config": {"architectures": ["Phi3ForCausalLM"]}}, "decoder Phi3ForCausalLM"),
        ({"llm_config": {"architectures": ["InternLM2ForCausalLM"]}}, "no entry 'bias'|lacks|no entry"),
        ({"vision_config": {}}, "no entry 'image_size'"),
        ({"vision_config": None}, "config.json is not as expected"),
        ({"downsample_ratio": "half"}, "config.json is not as expected"),
        ({"llm_config": {**original.internvl_config()["llm_config"], "hidden_size": "wide"}}, "config.json"),
        ({"llm_config": {**original.internvl_config()["llm_config"], "num_attention_heads": 0}}, "config.json"),
        ({"llm_config": {**original.internvl_config()["llm_config"], "num_key_value_heads": 3}}, "config.json"),
        ({"llm_config": {**original.internvl_config()["llm_config"], "num_hidden_layers": 3}}, "lacks"),
        ({"llm_config": {**original.internvl_config()["llm_config"], "rope_pos_id_version": "v2pe"}}, "v2pe"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], match: str, source: Path, tmp_path: Path) -> None:
    edit(source / "config.json", **changes)
    refused(source, tmp_path / "out", match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mm_spatial_pool_mode": "average"}, "mm_spatial_pool_mode = 'average'"),
        ({"mm_newline_position": "frame"}, "mm_newline_position = 'frame'"),
        ({"mm_vision_tower": "openai/clip"}, "vision tower openai/clip is not known"),
        ({"mm_projector_type": "linear"}, "mm_projector_type"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio"),
        ({"add_faster_video": True}, "add_faster_video"),
        ({"vocab_size": 20}, "no room for <image>, <video>, <video_newline>"),
        ({"tie_word_embeddings": True}, "tied embeddings"),
    ],
)
def test_llava_configs_that_are_refused(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    llava(tmp_path / "source", original.llava_config())
    edit(tmp_path / "source" / "config.json", **changes)
    refused(tmp_path / "source", tmp_path / "out", match)


def test_tokenizers_that_are_refused(source: Path, tmp_path: Path) -> None:
    settings = (source / "tokenizer_config.json").read_text()
    model = (source / "tokenizer.model").read_bytes()
    for data, match in (
        (original.sentencepiece_model([("<unk>", 0, 2)], model_type=1), "not a BPE model"),
        (original.sentencepiece_model([("<unk>", 0, 2)], byte_fallback=0), "no byte fallback"),
        (model[:-3], "the tokenizer cannot be read"),
    ):
        (source / "tokenizer.model").write_bytes(data)
        refused(source, tmp_path / "out", match)
    (source / "tokenizer.model").write_bytes(model)
    edit(source / "tokenizer_config.json", added_tokens_decoder={"500": {"content": "<IMG_CONTEXT>"}})
    refused(source, tmp_path / "out", "gives <IMG_CONTEXT> the id")
    edit(source / "tokenizer_config.json", added_tokens_decoder={})
    refused(source, tmp_path / "out", "no token <img>")
    (source / "tokenizer_config.json").write_text(settings)
    (source / "tokenizer.model").unlink()
    refused(source, tmp_path / "out", "no tokenizer there")


def test_no_checkpoint_and_a_full_output(source: Path, tmp_path: Path) -> None:
    refused(tmp_path / "absent", tmp_path / "out", "no config.json there")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    refused(source, tmp_path / "full", "there is something already")
    (source / "config.json").write_text("[1")
    refused(source, tmp_path / "out", "not a JSON object")


def test_a_failure_while_writing_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def fail(_stage: str, done: int, _total: int) -> None:
        if done:
            raise OSError("disk full")

    before = set(tmp_path.iterdir())
    with pytest.raises(OSError, match="disk full"):
        convert_checkpoint(source, tmp_path / "out", progress=fail)
    assert set(tmp_path.iterdir()) == before


def test_an_empty_folder_is_taken(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert_checkpoint(source, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", str(source), "--out", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    for word in ("InternLM2ForCausalLM", "InternVLForConditionalGeneration", str(tmp_path / "a")):
        assert word in shown
    assert cli.main(["convert", str(source), "--out", str(tmp_path / "b"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["n_shards"] == 2
    assert report["out"] == str(tmp_path / "b")
    assert cli.main(["convert", str(source), "--out", str(tmp_path / "a")]) == 2
    assert "there is something already" in capsys.readouterr().err


def test_neither_code_nor_pickles_are_opened(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(torch, "load", fail)
    (source / "modeling_internvl_chat.py").write_text("raise SystemExit('code of the checkpoint ran')")
    (source / "pytorch_model.bin").write_bytes(b"not even a pickle")
    edit(source / "config.json", auto_map={"AutoConfig": "modeling_internvl_chat.X"})
    convert_checkpoint(source, tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert not any(name.endswith((".py", ".bin")) for name in written)
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in (tmp_path / "out" / name).read_text()
