"""Checkpoints of tiny models with processors of their own, saved as any are."""

from pathlib import Path
from typing import Any

import tiny_models as tiny
import transformers as hf

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'video') %} <{{ part['type'] }}> "
    "{% else %} {{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


def _tokenizer() -> Any:
    """Words and the ids that the tiny models use for visual tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = {"<image>": tiny.IMAGE, "<video>": tiny.VIDEO, "<img>": tiny.VISION_START, "</img>": tiny.VISION_END}
    vocabulary = {"[UNK]": 1, "[PAD]": tiny.PAD, **{f"word{i}": i for i in range(2, 190)}, **special}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<image>",
            "image_token": "<image>",
            "video_token": "<video>",
        },
    )


def save_checkpoint(name: str, folder: Path) -> None:
    """Of "internvl" or "llava_onevision"; its prompts are words: "word2", "word3", ..."""
    model = tiny.build(name)
    model.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    if name == "internvl":
        processor = hf.InternVLProcessor(
            image_processor=hf.GotOcr2ImageProcessor(size=size),
            tokenizer=_tokenizer(),
            video_processor=hf.InternVLVideoProcessor(size=size),
            image_seq_length=4,
            chat_template=TEMPLATE,
        )
    else:
        processor = hf.LlavaOnevisionProcessor(
            image_processor=hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[16, 16]]),
            tokenizer=_tokenizer(),
            video_processor=hf.LlavaOnevisionVideoProcessor(size=size),
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            chat_template=TEMPLATE,
        )
    processor.save_pretrained(folder)
