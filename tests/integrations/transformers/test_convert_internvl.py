"""Tiny random InternVL2 checkpoints in their original layout give the same logits after the conversion."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import original_models as original
import original_tokenizers
import pytest
import torch
import transformers as hf
from tiny_models_original import edit, internvl, load, pixels, refused

import videoanchor_triton as va
from videoanchor_triton.app import pipeline
from videoanchor_triton.integrations.transformers.convert.conversion import convert_checkpoint


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


def test_config_is_written_for_every_transformers(tmp_path: Path) -> None:
    """5 reads the spelling of 4.57, not the other way round."""
    internvl(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert text["rope_scaling"] == {"rope_type": "dynamic", "factor": 2.0}
    assert text["rope_theta"] == 1000.0


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
    from videoanchor_triton.integrations.transformers.convert.tokenizer import sentencepiece_bpe

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
    converted = sentencepiece_bpe(tmp_path / "bpe.model", {}, add_bos=False)
    texts = [line for line in corpus if line.strip()]
    plain = not dummy_prefix and not trim
    for text in [*texts, "  two  spaces ", "你好 é🙂\n x", "\nline\n", " ", *(["a[UNUSED_1] b"] if plain else [])]:
        assert converted.encode(text).ids == reference.encode(text), text


def test_protobuf_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ImportError("no module named google.protobuf")

    internvl(tmp_path / "source")
    monkeypatch.setattr(import_module("transformers.convert_slow_tokenizer"), "import_protobuf", fail)
    refused(tmp_path / "source", tmp_path / "out", r"protobuf: pip install 'videoanchor-triton\[convert\]'")


def test_chat_template_of_internvl2(tmp_path: Path) -> None:
    internvl(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "word5"}]}
    prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert prompt.startswith("<|im_start|>system\n你是由上海人工智能实验室")
    assert prompt.endswith("<|im_end|><|im_start|>user\n<video>\nword5<|im_end|><|im_start|>assistant\n")


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


def test_missing_unknown_and_misshapen_tensors(tmp_path: Path) -> None:
    model = internvl(tmp_path / "source")
    folder, state = tmp_path / "source", model.state_dict()
    key = "language_model.model.layers.1.attention.wqkv.weight"
    without = {name: tensor for name, tensor in state.items() if name != key}
    original.write_weights(folder, without)
    refused(folder, tmp_path / "out", r"lacks 3 of \d+ tensors \(.*layers.1.self_attn.k_proj")
    original.write_weights(folder, {**state, "language_model.model.layers.0.adapter": torch.ones(1)})
    refused(folder, tmp_path / "out", r"no place for \(language_model.model.layers.0.adapter")
    original.write_weights(folder, {**state, key.replace("layers.1", "layers.2"): state[key]})
    refused(folder, tmp_path / "out", "no place for .*layers.2")
    original.write_weights(folder, {**state, "language_model.lm_head.weight": state["language_model.output.weight"]})
    refused(folder, tmp_path / "out", r"no place for \(language_model.output.weight\)")
    original.write_weights(folder, {**without, key: state[key][:-1]})
    refused(folder, tmp_path / "out", "does not fit config.json")
    norm = "language_model.model.norm.weight"
    original.write_weights(folder, {**state, norm: state[norm][:-1]})
    refused(folder, tmp_path / "out", "asks for shape")
    original.write_weights(folder, {**state, norm: torch.ones(32, dtype=torch.int8)})
    refused(folder, tmp_path / "out", "stored as I8")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    internvl(tmp_path / "source", n_shards=2)
    return tmp_path / "source"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "qwen2_5_vl"}, "model_type 'qwen2_5_vl'.*needs no conversion"),
        ({"ps_version": "v1"}, "ps_version"),
        ({"select_layer": -4}, "select_layer"),
        ({"force_image_size": 8}, "force_image_size"),
        ({"use_llm_lora": 16}, "use_llm_lora"),
        ({"template": "phi3-chat"}, "template = 'phi3-chat'"),
        ({"llm_config": {"architectures": ["Phi3ForCausalLM"]}}, "decoder = 'Phi3ForCausalLM'"),
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


def test_tokenizers_that_are_refused(source: Path, tmp_path: Path) -> None:
    settings = (source / "tokenizer_config.json").read_text()
    model = (source / "tokenizer.model").read_bytes()
    for data, match in (
        (original_tokenizers.sentencepiece_model([("<unk>", 0, 2)], model_type=1), "not a BPE model"),
        (original_tokenizers.sentencepiece_model([("<unk>", 0, 2)], byte_fallback=False), "no byte fallback"),
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
