"""The files of tokenizers as the repositories of InternVL2 and LLaVA-Video hold them, small."""

from pathlib import Path
from typing import Any

from original_models import write_json
from transformers.convert_slow_tokenizer import import_protobuf

WORDS = [f"word{i}" for i in range(60)]


def write_internlm2_tokenizer(folder: Path) -> None:
    """tokenizer.model and tokenizer_config.json as InternVL2 has them: added tokens in place of the last pieces of the
    sentencepiece model and after them."""
    characters = sorted(set("".join(WORDS)) | set("▁:\nFrame"))
    start = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in (0x0A, 0xC3, 0xA9)]]
    pieces = [(text, 0.0, kind) for text, kind in zip(start, (2, 3, 3, 6, 6, 6), strict=True)]
    pieces += [("wo", -1.0, 1), ("rd", -2.0, 1), ("word", -3.0, 1), ("▁word", -4.0, 1)]
    pieces += [(character, -10.0 - i, 1) for i, character in enumerate(characters)]
    unused = [("[UNUSED_TOKEN_1]", 0.0, 4), ("[UNUSED_TOKEN_2]", 0.0, 4)]
    pieces += unused
    n = len(pieces)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(pieces))
    added = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<box>"]
    decoder = {str(n - 2 + i): {"content": token, "special": True} for i, token in enumerate(added)}
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    auto = {"auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": decoder, **names, **auto})


def sentencepiece_model(
    pieces: list[tuple[str, float, int]], *, model_type: int = 2, byte_fallback: bool = True
) -> bytes:
    """A sentencepiece BPE model in its protobuf form, with no dummy prefix and no trimming of spaces."""
    schema: Any = import_protobuf()
    model = schema.ModelProto()
    for text, score, kind in pieces:
        model.pieces.add(piece=text, score=score, type=kind)
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = model_type, byte_fallback
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString()


def write_qwen2_tokenizer(folder: Path, *, internvl: bool) -> None:
    """vocab.json, merges.txt and added_tokens.json of a byte-level BPE."""
    from tokenizers import pre_tokenizers

    alphabet = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c in "word0123456789:Framusetyjyn.,ĠĊ"]
    vocabulary = [*alphabet, "wo", "rd", "word"]
    write_json(folder / "vocab.json", {text: i for i, text in enumerate(vocabulary)})
    (folder / "merges.txt").write_text("#version: 0.2\nw o\nr d\nwo rd\n", encoding="utf-8")
    added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] + (["<img>", "</img>", "<IMG_CONTEXT>"] if internvl else [])
    write_json(folder / "added_tokens.json", {token: len(vocabulary) + i for i, token in enumerate(added)})
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer"}
    write_json(folder / "tokenizer_config.json", names)
