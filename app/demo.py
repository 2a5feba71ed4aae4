"""What `videoanchor demo` runs on: a clip with known camera motion and a tiny random Qwen2.5-VL, both made here."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers as hf

from ..anchor.timing import Progress
from ..integrations.errors import InputError
from ..integrations.transformers import attention
from ..kernels.api import anchored_attention
from ..kernels.reference import reference_attention
from .atomic_write import replacing, write_whole
from .text import json_text
from .token_grid import TokenGrid
from .video.reader import write_video

_V5 = int(hf.__version__.split(".")[0]) >= 5
FRAME_HEIGHT, FRAME_WIDTH = 252, 336
FPS = 8
N_FRAMES = 48
QUESTION = "Which roof is nearer to the camera, the left one or the right one?"


def camera_path(n_frames: int, height: int, width: int) -> np.ndarray:
    """A pan to the right with a zoom in, over a photograph of `height` x `width`: (n_frames, 3) fp64, left and top
    edge of the view and its scale, all in photograph pixels."""
    t = np.linspace(0, 1, n_frames)
    widest = min(height / FRAME_HEIGHT, width / FRAME_WIDTH)
    scale = widest * (1 - 0.35 * t)
    room_x, room_y = width - scale * FRAME_WIDTH, height - scale * FRAME_HEIGHT
    return np.stack([room_x * (0.5 + 0.45 * np.sin(np.pi * (t - 0.5))), room_y * (0.3 + 0.4 * t), scale], 1)


def make_clip(path: Path) -> np.ndarray:
    """Writes the clip as MP4: half of it over each of the two photographs that scikit-learn ships.

    Returns:
        (N_FRAMES, 4) fp64 camera of each frame: photograph, then left, top and scale as `camera_path` gives them.
    """
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    frames, cameras = [], []
    for number, photograph in enumerate(photographs):
        height, width = photograph.shape[:2]
        for left, top, scale in camera_path(N_FRAMES // len(photographs), height, width):
            view = (left, top, left + scale * FRAME_WIDTH, top + scale * FRAME_HEIGHT)
            size = (FRAME_WIDTH, FRAME_HEIGHT)
            frames.append(np.asarray(Image.fromarray(photograph).resize(size, Image.Resampling.BICUBIC, box=view)))
            cameras.append((number, left, top, scale))
    with replacing(path) as scratch:
        write_video(scratch, np.stack(frames), FPS)
    return np.array(cameras)


def make_checkpoint(folder: Path) -> None:
    """Writes a randomly initialised Qwen2.5-VL of a few million parameters, with its image and video processing, a
    byte-level tokenizer and a chat template, as any checkpoint is written.

    Raises:
        InputError: `folder` is a link.
    """
    if folder.is_symlink():
        raise InputError(f"{folder} is a link, and files would be written where it leads: give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch:
        _save_checkpoint(scratch)
        for file in Path(scratch).iterdir():
            write_whole(folder / file.name, file.read_bytes())


def _save_checkpoint(folder: str) -> None:
    torch.manual_seed(0)
    tokenizer = _make_tokenizer()
    special = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in SPECIAL}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": special["endoftext"],
        "eos_token_id": special["im_end"],
        "pad_token_id": special["endoftext"],
    }
    mrope = {"mrope_section": [8, 12, 12]}
    if _V5:
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, **mrope}
    else:
        text |= {"rope_scaling": {"type": "mrope", **mrope}, "rope_theta": 1e6}
    vision = {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "out_hidden_size": 256,
        "fullatt_block_indexes": [3],
        "tokens_per_second": 2,
    }
    config = hf.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=special["image_pad"],
        video_token_id=special["video_pad"],
        vision_start_token_id=special["vision_start"],
        vision_end_token_id=special["vision_end"],
    )
    model = hf.Qwen2_5_VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:  # wide enough that attention and answer are not uniform
                gain = 2.0 if "lm_head" in name else 0.3 if name.endswith(_VISION_OUTPUTS) else 1.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain * parameter[0].numel() ** -0.5)
        patches: torch.Tensor = model.model.visual.patch_embed.proj.weight
        patches.copy_(_smooth_filters(patches.shape, generator))
    printable = {id for token, id in tokenizer.get_vocab().items() if token.isascii() and not token.startswith("<|")}
    model.generation_config.suppress_tokens = sorted(set(range(len(tokenizer))) - printable)
    model.save_pretrained(folder)
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 128 * N_FRAMES * 28 * 28}
    processor = hf.Qwen2_5_VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=hf.Qwen2VLVideoProcessor(size=size),
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)


SPECIAL = (
    "endoftext",
    "im_start",
    "im_end",
    "vision_start",
    "vision_end",
    "vision_pad",
    "image_pad",
    "video_pad",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# Small residual branches in the vision tower: a token keeps the look of its own patch.
_VISION_OUTPUTS = ("attn.proj.weight", "mlp.down_proj.weight")


def _smooth_filters(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Random filters (out, channels, time, height, width) that vary slowly over a patch, as trained ones do: sums of
    the two lowest cosines in each direction, constant in time, of unit norm."""
    out, channels, _, height, width = shape
    y, x = (torch.arange(n) + 0.5 for n in (height, width))
    rows = torch.stack([torch.ones(height), torch.cos(torch.pi * y / height)])
    columns = torch.stack([torch.ones(width), torch.cos(torch.pi * x / width)])
    weight = torch.randn(out, channels, 1, 2, 2, generator=generator)
    filters = torch.einsum("octuv,uh,vw->octhw", weight, rows, columns).expand(shape)
    return filters / filters.flatten(1).norm(dim=1)[:, None, None, None, None]


def _make_tokenizer() -> Any:
    """Bytes, the merges of a few English words, and Qwen's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[f"<|{name}|>" for name in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([QUESTION, "user assistant system video image left right near far"] * 4, trainer)
    # 4.57's processor insists on Qwen's class, which in 5 builds a tokenizer of its own
    wrapper = hf.PreTrainedTokenizerFast if _V5 else hf.Qwen2TokenizerFast  # pyright: ignore[reportAttributeAccessIssue]
    return wrapper(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[f"<|{name}|>" for name in SPECIAL],
    )


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """The arguments of one call of the gated attention in a run."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: dict[str, Any]


@contextmanager
def record_attention() -> Iterator[list[AttentionCall]]:
    """While this is open, the attention calls of every enabled model are kept."""
    calls: list[AttentionCall] = []

    def recorded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append(AttentionCall(q, k, v, options))
        return anchored_attention(q, k, v, **options)

    with mock.patch.object(attention, "anchored_attention", recorded):
        yield calls


@torch.inference_mode()
def compare_with_reference(
    calls: list[AttentionCall], backend: str, progress: Progress | None = None
) -> tuple[float, float]:
    """Computes each call again, densely in fp64 and by `backend`, on the very tensors of the run.

    Returns:
        the largest |output - reference| and the largest |reference|.

    Raises:
        ValueError: when the backend cannot run here.
    """
    error = largest = 0.0
    for n, call in enumerate(calls):
        options = {name: value for name, value in call.options.items() if name not in ("gate_form", "return_lse")}
        expected, _ = reference_attention(call.q, call.k, call.v, dtype=torch.float64, **options)
        out = anchored_attention(call.q, call.k, call.v, backend=backend, **call.options)
        error = max(error, float((out.double() - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
        if progress is not None:
            progress(f"{backend} attention compared with the dense reference", n + 1, len(calls))
    return error, largest


def write_cameras(path: Path, cameras: np.ndarray) -> None:
    """The camera of each frame as JSON, a list of {photograph, left, top, scale}."""
    names = ("photograph", "left", "top", "scale")
    text = json_text([dict(zip(names, map(float, camera), strict=True)) for camera in cameras], indent=1)
    write_whole(path, f"{text}\n".encode())


def matching_tokens(cameras: np.ndarray, grid: TokenGrid) -> np.ndarray:
    """Pairs of tokens of neighbouring time steps that show the same place of a photograph, by the known camera.

    Args:
        cameras: (T, 4), rows of `make_clip`'s cameras for the sampled frames; each grid step covers T / grid.t of them.
        grid: where the visual tokens lie.

    Returns:
        (P, 2) int64 token indices.
    """
    t, h, w = grid.t, grid.h, grid.w
    camera = cameras[((np.arange(t) + 0.5) * len(cameras) / t).astype(int)]
    y, x = (axis.ravel() + 0.5 for axis in np.meshgrid(np.arange(h), np.arange(w), indexing="ij"))
    cell_y, cell_x = FRAME_HEIGHT / h, FRAME_WIDTH / w
    pairs = []
    for step in range(t - 1):
        (photograph, left, top, scale), (next_photograph, next_left, next_top, next_scale) = camera[step : step + 2]
        if photograph != next_photograph:
            continue
        column = np.floor((left + x * cell_x * scale - next_left) / (next_scale * cell_x)).astype(int)
        row = np.floor((top + y * cell_y * scale - next_top) / (next_scale * cell_y)).astype(int)
        inside = np.flatnonzero((column >= 0) & (column < w) & (row >= 0) & (row < h))
        pairs.append(np.stack([step * h * w + inside, (step + 1) * h * w + row[inside] * w + column[inside]], 1))
    return np.concatenate(pairs)


def agreement(labels: np.ndarray, cameras: np.ndarray, grid: TokenGrid) -> tuple[float, float, int]:
    """How often tokens that show the same place fall into the same subspace.

    Returns:
        the share among the pairs of `matching_tokens`; the share to expect if the labels of each step were shuffled;
        the number of pairs.
    """
    pairs = matching_tokens(cameras, grid)
    share = float((labels[pairs[:, 0]] == labels[pairs[:, 1]]).mean())
    size = np.bincount(labels) / len(labels)
    return share, float((size**2).sum()), len(pairs)
