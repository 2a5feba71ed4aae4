"""The tokenizer of a checkpoint as one `tokenizer.json`, whatever files it came in, without its own code.

Three forms are read: `tokenizer.json`; `vocab.json` and `merges.txt` (Qwen2); a sentencepiece BPE model
`tokenizer.model` (InternLM2, Llama).
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from ...errors import InputError


class SourceTokenizer:
    """A tokenizer, with the ids of its added tokens checked.

    Args:
        backend: the tokenizer itself.
        config: tokenizer_config.json of the checkpoint.
        added: the added tokens by id.

    Raises:
        InputError: when an added token gets another id.
    """

    def __init__(self, backend: Tokenizer, config: dict[str, Any], added: dict[int, str]) -> None:
        self.backend, self._config = backend, config
        for index, token in sorted(added.items()):
            if (found := self.add(token)) != index:
                raise InputError(f"the tokenizer gives {token} the id {found}, the checkpoint {index}")

    def id_of(self, token: str) -> int:
        """The id of a token that must be there."""
        index = self.backend.token_to_id(token)
        if index is None:
            raise InputError(f"the tokenizer has no token {token}: copy all tokenizer files of the checkpoint")
        return index

    def add(self, token: str) -> int:
        """The id of a special token, which is appended if it is new."""
        self.backend.add_special_tokens([AddedToken(token, normalized=False)])
        return self.id_of(token)

    def settings(self) -> dict[str, Any]:
        """What goes from the checkpoint's tokenizer_config.json into the new one."""
        named = {name: self._config.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        contents = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items()}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: token for name, token in contents.items() if token is not None},
            "model_max_length": self._config.get("model_max_length", 32768),
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        }


def read_tokenizer(source: Path, config: dict[str, Any], added: dict[str, int]) -> SourceTokenizer:
    """The tokenizer in a checkpoint's folder.

    Args:
        config: tokenizer_config.json.
        added: added_tokens.json.

    Raises:
        InputError: when there is none, its files contradict each other, or protobuf is needed and missing.
    """
    from transformers.convert_slow_tokenizer import Qwen2Converter

    tokens = {int(index): entry["content"] for index, entry in config.get("added_tokens_decoder", {}).items()}
    tokens |= {index: token for token, index in added.items()}
    whole, vocabulary, merges, model = (
        source / name for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model")
    )
    try:
        if whole.is_file():
            backend = Tokenizer.from_file(str(whole))
        elif vocabulary.is_file() and merges.is_file():
            backend = Qwen2Converter(None).converted(*models.BPE.read_file(str(vocabulary), str(merges)))
        elif model.is_file():
            backend = sentencepiece_bpe(model, tokens, add_bos=config.get("add_bos_token", True))
        else:
            raise InputError(
                f"{source}: no tokenizer there: expected tokenizer.json, vocab.json with merges.txt, or tokenizer.model"
            )
    except InputError:
        raise
    except Exception as error:  # tokenizers raises Exception itself
        raise InputError(f"{source}: the tokenizer cannot be read ({error}): download it again") from error
    return SourceTokenizer(backend, config, tokens)


def sentencepiece_bpe(path: Path, added: dict[int, str], *, add_bos: bool) -> Tokenizer:
    """A sentencepiece BPE model with the same merges, normalisation and byte fallback.

    transformers' `LlamaConverter` reads the same file, but raises in 5.23.0, and in 4.57.1 gives other tokens than
    sentencepiece for 332 of 379 lines of code where the model trims spaces. Its schema and its merges are used.

    An added token whose id is inside the vocabulary takes the place of the piece there (InternLM2 keeps unused pieces
    for them). Text beside a user-defined piece is normalised on its own, which differs from sentencepiece where the
    model adds a dummy prefix or trims spaces (InternLM2 and its like do neither there).
    """
    from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

    try:
        schema: Any = import_protobuf()
    except ImportError as error:
        raise InputError(f"{path} is read with protobuf: pip install 'videoanchor-triton[convert]'") from error
    model = schema.ModelProto.FromString(path.read_bytes())
    trainer, spaces, kinds = model.trainer_spec, model.normalizer_spec, model.SentencePiece
    if trainer.model_type != trainer.BPE:
        raise InputError("tokenizer.model is not a BPE model: only sentencepiece BPE is converted")
    if not trainer.byte_fallback:
        raise InputError("tokenizer.model has no byte fallback: only sentencepiece BPE with byte fallback is converted")
    texts: list[str] = [piece.piece for piece in model.pieces]
    vocabulary = {added.get(index, text): index for index, text in enumerate(texts)}
    kept = [piece for piece in model.pieces if piece.piece in vocabulary]
    scores = {piece.piece: piece.score for piece in kept if piece.type == kinds.NORMAL}
    merges = generate_merges({text: vocabulary[text] for text in scores}, scores)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=trainer.unk_piece, fuse_unk=True, byte_fallback=True)
    )
    steps: list[Any] = []
    if spaces.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spaces.precompiled_charsmap))
    if spaces.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spaces.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(undo)
    user_defined = [AddedToken(piece.piece, normalized=False) for piece in kept if piece.type == kinds.USER_DEFINED]
    tokenizer.add_tokens(user_defined)
    if add_bos:
        start = trainer.bos_piece
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", pair=f"{start} $A {start} $B", special_tokens=[(start, vocabulary[start])]
        )
    return tokenizer
