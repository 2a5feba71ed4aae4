"""Small versions of the models that `videoanchor convert` reads, in their original layout, from the descriptions of
their architectures; and folders as their repositories hold them.

InternVL2: InternViT with fused q, k, v, pixel shuffle, an MLP, InternLM2 with q, k, v fused by KV group.
LLaVA-Video: SigLIP without its last layer, an MLP, bilinear pooling of frames, newlines, Qwen2.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import save_file
from torch import nn

IMAGE, PATCH = 16, 4


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class VisionAttention(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        width = c["hidden_size"]
        self.heads, self.qk_norm = c["num_attention_heads"], c["qk_normalization"]
        self.qkv = nn.Linear(width, 3 * width, bias=c["qkv_bias"])
        self.proj = nn.Linear(width, width)
        if self.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(width), RMSNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VisionLayer(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        width = c["hidden_size"]
        norm = nn.LayerNorm if c["norm_type"] == "layer_norm" else RMSNorm
        self.attn, self.mlp = VisionAttention(c), VisionMLP(width, c["intermediate_size"])
        self.norm1, self.norm2 = norm(width, eps=1e-6), norm(width, eps=1e-6)
        self.ls1, self.ls2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x)) * self.ls1
        return x + self.mlp(self.norm2(x)) * self.ls2


class InternViT(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        width, n = c["hidden_size"], (c["image_size"] // c["patch_size"]) ** 2
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.embeddings.patch_embedding = nn.Conv2d(3, width, c["patch_size"], c["patch_size"])
        self.embeddings.position_embedding = nn.Parameter(torch.zeros(1, n + 1, width))
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([VisionLayer(c) for _ in range(c["num_hidden_layers"])])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        e = self.embeddings
        patches = e.patch_embedding(pixels).flatten(2).transpose(1, 2)  # pyright: ignore[reportCallIssue]
        x = torch.cat([e.class_embedding.expand(len(pixels), -1, -1), patches], 1)  # pyright: ignore
        x = x + e.position_embedding  # pyright: ignore[reportOperatorIssue]
        for layer in self.encoder.layers:  # pyright: ignore[reportGeneralTypeIssues]
            x = layer(x)
        return x


class InternLM2Layer(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        width, inner = c["hidden_size"], c["intermediate_size"]
        self.heads, self.kv, self.c = c["num_attention_heads"], c["num_key_value_heads"], c
        dim = width // self.heads
        self.attention = nn.Module()
        self.attention.wqkv = nn.Linear(width, (self.heads + 2 * self.kv) * dim, bias=c["bias"])
        self.attention.wo = nn.Linear(width, width, bias=c["bias"])
        self.feed_forward = nn.Module()
        self.feed_forward.w1 = nn.Linear(width, inner, bias=False)
        self.feed_forward.w3 = nn.Linear(width, inner, bias=False)
        self.feed_forward.w2 = nn.Linear(inner, width, bias=False)
        self.attention_norm, self.ffn_norm = RMSNorm(width, c["rms_norm_eps"]), RMSNorm(width, c["rms_norm_eps"])

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        """RoPE with dynamic NTK scaling: the base grows once the sequence is past the trained length."""
        n, dim = x.shape[-2:]
        base, limit = self.c["rope_theta"], self.c["max_position_embeddings"]
        scaling = self.c["rope_scaling"]
        if scaling is not None and n > limit:
            base = base * (scaling["factor"] * n / limit - (scaling["factor"] - 1)) ** (dim / (dim - 2))
        angles = torch.arange(n)[:, None] / base ** (torch.arange(0, dim, 2) / dim)
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        group = self.heads // self.kv
        fused = self.attention.wqkv(self.attention_norm(x))  # pyright: ignore[reportCallIssue]
        fused = fused.unflatten(-1, (self.kv, group + 2, -1))  # (batch, n, kv, group + 2, dim)
        q = self._rotate(fused[..., :group, :].flatten(2, 3).transpose(1, 2))
        k = self._rotate(fused[..., group, :].transpose(1, 2)).repeat_interleave(group, 1)
        v = fused[..., group + 1, :].transpose(1, 2).repeat_interleave(group, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.attention.wo(mixed)  # pyright: ignore[reportCallIssue]
        y, mlp = self.ffn_norm(x), self.feed_forward
        return x + mlp.w2(F.silu(mlp.w1(y)) * mlp.w3(y))  # pyright: ignore[reportCallIssue]


class InternLM2(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.tok_embeddings = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.model.layers = nn.ModuleList([InternLM2Layer(c) for _ in range(c["num_hidden_layers"])])
        self.model.norm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.output = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)

    def get_input_embeddings(self) -> Any:
        return self.model.tok_embeddings

    def forward(self, inputs_embeds: torch.Tensor) -> Any:
        x = inputs_embeds
        for layer in self.model.layers:  # pyright: ignore[reportGeneralTypeIssues]
            x = layer(x)
        return hf.modeling_outputs.CausalLMOutput(logits=self.output(self.model.norm(x)))  # pyright: ignore


_DECODERS = {
    "LlamaForCausalLM": (hf.LlamaForCausalLM, hf.LlamaConfig),
    "Qwen2ForCausalLM": (hf.Qwen2ForCausalLM, hf.Qwen2Config),
    "Qwen3ForCausalLM": (hf.Qwen3ForCausalLM, hf.Qwen3Config),
}


def decoder(c: dict[str, Any]) -> Any:
    """The original takes transformers' classes for all but InternLM2."""
    name = c["architectures"][0]
    if name == "InternLM2ForCausalLM":
        return InternLM2(c)
    model, config = _DECODERS[name]
    return model(config(**{key: value for key, value in c.items() if key != "architectures"}))


class InternVLChat(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        vision, text = config["vision_config"], config["llm_config"]
        wide = 4 * vision["hidden_size"]
        self.vision_model, self.language_model = InternViT(vision), decoder(text)
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(wide),
            nn.Linear(wide, text["hidden_size"]),
            nn.GELU(),
            nn.Linear(text["hidden_size"], text["hidden_size"]),
        )

    def forward(self, ids: torch.Tensor, pixels: torch.Tensor, context: int) -> torch.Tensor:
        x = self.vision_model(pixels)[:, 1:]
        side = math.isqrt(x.shape[1])
        # 2 x 2 neighbours into the channels, as (rows, columns, row in pair, column in pair, channel)
        x = x.view(len(x), side // 2, 2, side // 2, 2, -1).permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
        embeds = self.language_model.get_input_embeddings()(ids).clone()
        embeds[ids == context] = self.mlp1(x).flatten(0, 1)
        return self.language_model(inputs_embeds=embeds).logits


class SiglipLayer(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        width, self.heads = c["hidden_size"], c["num_attention_heads"]
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.self_attn = nn.ModuleDict({f"{part}_proj": nn.Linear(width, width) for part in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, c["intermediate_size"]), "fc2": nn.Linear(c["intermediate_size"], width)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer_norm1(x)
        q, k, v = (self.self_attn[f"{p}_proj"](y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in "qkv")
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.self_attn["out_proj"](mixed)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh"))


class Siglip(nn.Module):
    """The tower without its last layer; the features are those before `post_layernorm`."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.patch_embedding = nn.Conv2d(3, c["hidden_size"], c["patch_size"], c["patch_size"])
        self.embeddings.position_embedding = nn.Embedding((c["image_size"] // c["patch_size"]) ** 2, c["hidden_size"])
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([SiglipLayer(c) for _ in range(c["num_hidden_layers"])])
        self.post_layernorm = nn.LayerNorm(c["hidden_size"], eps=1e-6)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        e = self.embeddings
        x = e.patch_embedding(pixels).flatten(2).transpose(1, 2)  # pyright: ignore[reportCallIssue]
        x = x + e.position_embedding.weight  # pyright: ignore
        for layer in self.encoder.layers:  # pyright: ignore[reportGeneralTypeIssues]
            x = layer(x)
        return x


class LlavaVideo(nn.Module):
    """Keys as in llava_qwen: `model.` holds the decoder, the tower, the projector and the newline."""

    def __init__(self, config: dict[str, Any], tower: dict[str, Any]) -> None:
        super().__init__()
        whole = hf.Qwen2ForCausalLM(hf.Qwen2Config(**{k: config[k] for k in _QWEN2_KEYS}))
        self.model, self.lm_head, self.config = whole.model, whole.lm_head, config
        self.tower = Siglip(tower)
        width = config["hidden_size"]
        self.projector = nn.Sequential(nn.Linear(tower["hidden_size"], width), nn.GELU(), nn.Linear(width, width))
        self.newline = nn.Parameter(torch.zeros(width))

    def original_state(self) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        if not self.config["tie_word_embeddings"]:
            state["lm_head.weight"] = self.lm_head.weight
        for key, value in self.tower.state_dict().items():
            state[f"model.vision_tower.vision_tower.vision_model.{key}"] = value
        state |= {f"model.mm_projector.{key}": value for key, value in self.projector.state_dict().items()}
        return state | {"model.image_newline": self.newline}

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.projector(self.tower(pixels))

    def _logits(self, before: list[int], visual: torch.Tensor, after: list[int]) -> torch.Tensor:
        table = self.model.embed_tokens.weight
        embeds = torch.cat([table[before], visual, table[after]])
        return self.lm_head(self.model(inputs_embeds=embeds[None]).last_hidden_state)

    def image_logits(self, before: list[int], pixels: torch.Tensor, after: list[int]) -> torch.Tensor:
        """Text, one image that fills one tile, text: the whole image, then its tile with a newline after each row."""
        whole, tile = self._features(pixels)
        side = math.isqrt(len(tile))
        rows = torch.cat([tile.unflatten(0, (side, side)), self.newline.expand(side, 1, -1)], 1)
        return self._logits(before, torch.cat([whole, rows.flatten(0, 1)]), after)

    def forward(self, before: list[int], frames: torch.Tensor, after: list[int]) -> torch.Tensor:
        """Logits of text, one video, text."""
        x = self._features(frames)
        side = math.isqrt(x.shape[1])
        x = x.transpose(1, 2).unflatten(2, (side, side))
        x = F.interpolate(x, size=[math.ceil(side / 2)] * 2, mode="bilinear").permute(0, 2, 3, 1)
        if self.config["mm_newline_position"] == "grid":
            newlines = self.newline.expand(*x.shape[:2], 1, -1)
            visual = torch.cat([x, newlines], 2).flatten(0, 2)
        else:
            visual = torch.cat([x.flatten(0, 2), self.newline[None]])
        return self._logits(before, visual, after)


_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 1000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
_QWEN2_KEYS = (*_TEXT, "vocab_size")


def internvl_config(architecture: str = "InternLM2ForCausalLM", **changes: Any) -> dict[str, Any]:
    """config.json of a tiny InternVL2; `changes` go to the entry that has them, the decoder's first."""
    text = {**_TEXT, "architectures": [architecture], "vocab_size": 90, "torch_dtype": "float32"}
    if architecture == "InternLM2ForCausalLM":
        text |= {"bias": False, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    vision = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "image_size": IMAGE,
        "patch_size": PATCH,
        "layer_norm_eps": 1e-6,
        "norm_type": "layer_norm",
        "qkv_bias": True,
        "qk_normalization": False,
    }
    config = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": IMAGE,
        "max_dynamic_patch": 12,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internlm2-chat",
        "torch_dtype": "float32",
    }
    for key, value in changes.items():
        next((part for part in (text, vision) if key in part), config)[key] = value
    return {**config, "llm_config": text, "vision_config": vision}


TOWER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 20,
    "patch_size": PATCH,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


def llava_config(**changes: Any) -> dict[str, Any]:
    """config.json of a tiny LLaVA-Video; its tower is a name that the test has to declare."""
    return {
        **_TEXT,
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        "vocab_size": 90,
        "mm_vision_tower": "tiny",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_spatial_pool_mode": "bilinear",
        "mm_spatial_pool_stride": 2,
        "mm_newline_position": "grid",
        "mm_resampler_type": None,
        "add_faster_video": False,
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": [[20, 20], [20, 40], [40, 20]],
        "torch_dtype": "float32",
        **changes,
    }


def randomise(model: nn.Module) -> nn.Module:
    """Weights wide enough that attention is far from uniform and no two tensors are alike."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.3 if parameter.ndim > 1 else noise * 0.3 + 0.7)
    return model.eval()


def write_weights(folder: Path, state: dict[str, torch.Tensor], n_shards: int = 1) -> None:
    """safetensors as they are published: one file, or shards and an index."""
    state = {key: tensor.detach().clone() for key, tensor in state.items()}
    if n_shards == 1:
        save_file(state, folder / "model.safetensors")
        return
    places = {}
    for i in range(n_shards):
        name = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        keys = list(state)[i::n_shards]
        save_file({key: state[key] for key in keys}, folder / name)
        places |= dict.fromkeys(keys, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content))
