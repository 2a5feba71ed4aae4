"""The tokenizer of a checkpoint as one `tokenizer.json`, whatever files it came in, without its own code.

Three forms are read: `tokenizer.json`; `vocab.json` and `merges.txt` (Qwen2); a sentencepiece BPE model
`tokenizer.model` (InternLM2, Llama), by the published protobuf schema of sentencepiece
(https://github.com/google/sentencepiece, src/sentencepiece_model.proto).
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NORMAL, _UNKNOWN, _USER_DEFINED = 1, 2, 4  # kinds of pieces of a sentencepiece model
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


class SourceTokenizer:
    """A tokenizer, with the ids of its added tokens checked.

    Args:
        backend: the tokenizer itself.
        config: tokenizer_config.json of the checkpoint.
        added: the added tokens by id.
    """

    def __init__(self, backend: "Tokenizer", config: dict[str, Any], added: dict[int, str]) -> None:
        self.backend, self.config = backend, config
        for index, token in sorted(added.items()):
            if backend.token_to_id(token) != index and self.add(token) != index:
                raise InputError(f"the tokenizer gives {token} the id {self.id_of(token)}, the checkpoint {index}")
            self._mark_special(token)

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def id_of(self, token: str) -> int:
        """The id of a token that must be there."""
        index = self.backend.token_to_id(token)
        if index is None:
            raise InputError(f"the tokenizer has no token {token}: copy all tokenizer files of the checkpoint")
        return index

    def add(self, token: str) -> int:
        """The id of a special token, which is appended if it is new."""
        self._mark_special(token)
        return self.id_of(token)

    def _mark_special(self, token: str) -> None:
        from tokenizers import AddedToken

        self.backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])


def read_tokenizer(source: Path) -> SourceTokenizer:
    """The tokenizer in a checkpoint's folder.

    Raises:
        InputError: when there is none, or its files contradict each other.
    """
    from tokenizers import Tokenizer

    config = _json(source / "tokenizer_config.json")
    added = {int(index): entry["content"] for index, entry in config.get("added_tokens_decoder", {}).items()}
    added |= {index: token for token, index in _json(source / "added_tokens.json").items()}
    try:
        if (source / "tokenizer.json").is_file():
            backend = Tokenizer.from_file(str(source / "tokenizer.json"))
        elif (source / "vocab.json").is_file() and (source / "merges.txt").is_file():
            backend = _byte_level(source)
        elif (source / "tokenizer.model").is_file():
            backend = _sentencepiece((source / "tokenizer.model").read_bytes(), config, added)
        else:
            raise InputError(
                f"{source}: no tokenizer there: expected tokenizer.json, vocab.json with merges.txt, or tokenizer.model"
            )
    except InputError:
        raise
    except Exception as error:  # tokenizers raises Exception itself
        raise InputError(f"{source}: the tokenizer cannot be read ({error}): download it again") from error
    return SourceTokenizer(backend, config, added)


def tokenizer_files(tokenizer: SourceTokenizer, tokens: dict[str, str], processor: str) -> dict[str, Any]:
    """tokenizer_config.json, with `tokens` as named tokens that the processor asks for."""
    named = {name: tokenizer.config.get(name) for name in _NAMED}
    contents = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items()}
    return {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": processor,
            **{name: token for name, token in contents.items() if token is not None},
            "extra_special_tokens": tokens,
            "model_max_length": tokenizer.config.get("model_max_length", 32768),
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        }
    }


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: download it again") from error


def _byte_level(source: Path) -> "Tokenizer":
    """Byte-level BPE with the splitting rule of Qwen2."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.BPE.from_file(str(source / "vocab.json"), str(source / "merges.txt")))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _sentencepiece(data: bytes, config: dict[str, Any], added: dict[int, str]) -> "Tokenizer":
    """A sentencepiece BPE model with the same merges, normalisation and byte fallback.

    An added token whose id is inside the vocabulary takes the place of the piece there (InternLM2 keeps unused pieces
    for them). Text beside a user-defined piece is normalised on its own, which differs from sentencepiece where the
    model adds a dummy prefix or trims spaces (InternLM2 and its like do neither there).
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for field, value in _fields(data):
        if field == 1:
            piece = dict(_fields(value))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0], piece.get(3, 1)))
        elif field == 2:
            trainer = dict(_fields(value))
        elif field == 3:
            normalizer = dict(_fields(value))
    if trainer.get(3, 1) != 2:
        raise InputError("tokenizer.model is not a BPE model: only sentencepiece BPE is converted")
    if not trainer.get(35, 0):
        raise InputError("tokenizer.model has no byte fallback: only sentencepiece BPE with byte fallback is converted")
    vocabulary = {added.get(index, text): index for index, (text, _, _) in enumerate(pieces)}
    scores = {text: score for text, score, kind in pieces if kind == _NORMAL and text in vocabulary}
    merges = [
        (-score, scores[text[:cut]], text[:cut], text[cut:])
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    merges.sort(key=lambda merge: (merge[0], vocabulary.get(merge[2], 0), vocabulary.get(merge[3], 0)))
    unknown = next(text for text, _, kind in pieces if kind == _UNKNOWN)
    model = models.BPE(
        vocabulary, [(left, right) for *_, left, right in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    steps: list[Any] = [normalizers.Precompiled(normalizer[2])] if normalizer.get(2) else []
    if normalizer.get(4, 1):  # remove_extra_whitespaces
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    dummy_prefix = bool(normalizer.get(3, 1))
    steps += [normalizers.Prepend("▁")] if dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*undo, *([decoders.Strip(" ", 1, 0)] if dummy_prefix else [])])
    whole = [text for text, _, kind in pieces if kind == _USER_DEFINED and text in vocabulary]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in whole])
    if config.get("add_bos_token", True):
        start = pieces[trainer.get(41, 1)][0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", pair=f"{start} $A {start} $B", special_tokens=[(start, vocabulary[start])]
        )
    return tokenizer


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: numbers for varints, bytes for the rest."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, varint()
            continue
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if at + size > len(data):
            raise ValueError("the file is cut short")
        yield tag >> 3, data[at : at + size]
        at += size
