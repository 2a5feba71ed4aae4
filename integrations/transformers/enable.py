"""`enable(model, config)` puts the gate on a model, `disable(model)` takes it off; handle.py is what it does there."""

from torch import nn

from ...anchor.config import VideoAnchorConfig
from .backbones import check_decoder
from .handle import HANDLE_ATTRIBUTE, Handle
from .visual_tokens import find_multimodal_model


def enable(model: nn.Module, config: VideoAnchorConfig) -> Handle:
    """Gates every decoder self-attention of `model` by the scores of its visual tokens.

    Args:
        model: a transformers video language model, also within a wrapper (PEFT, `torch.compile`) or split by `tp_plan`.
            Its language model's attention is set to `videoanchor_triton` until the handle is disabled; the vision
            tower keeps its own.
        config: scores and gate.

    Returns:
        A handle with `disable()` and `last`; as a context manager it disables at the end.

    Raises:
        ValueError: when the model has no visual tokens, is enabled already, or has a decoder whose attention is more
            than softmax(QK)V; when tokens are to be merged (`keep`) and nothing of it has a generate().
        TypeError: when `config` is not a `VideoAnchorConfig`.

    Warns:
        UserWarning: no test compares this class with this decoder to a dense gate; or tokens are to be merged and some
            layers are not full attention with softmax.

    See Also:
        disable: removes the gate where the handle is lost.
        VideoAnchorConfig: the settings.

    Examples:
        With a `model` of transformers, and `inputs` that its processor made of a question and a video of 12 visual
        tokens:

        >>> import videoanchor_triton as va
        >>> with va.enable(model, va.VideoAnchorConfig(alpha_k=9.5, alpha_v=2.5)) as handle:
        ...     output = model.generate(**inputs, max_new_tokens=4)
        >>> handle.last[0].scores.shape
        torch.Size([12])
    """
    if not isinstance(config, VideoAnchorConfig):
        raise TypeError(f"config: expected a VideoAnchorConfig, got {type(config).__name__}")
    base = find_multimodal_model(model)
    if hasattr(base, HANDLE_ATTRIBUTE):
        raise ValueError(f"{type(model).__name__} is enabled already: call videoanchor_triton.disable(model) first")
    check_decoder(base)
    return Handle(model, base, config)


def disable(model: nn.Module) -> None:
    """Removes the gate from a model, as `disable()` of the handle does, which may be lost. Without a gate, nothing
    happens.

    See Also:
        enable: sets the gate.

    Examples:
        With a `model` of transformers:

        >>> import videoanchor_triton as va
        >>> handle = va.enable(model, va.VideoAnchorConfig(alpha_k=9.5, alpha_v=2.5))
        >>> va.disable(model)
    """
    for module in model.modules():
        handle: Handle | None = getattr(module, HANDLE_ATTRIBUTE, None)
        if handle is not None:
            handle.disable()
