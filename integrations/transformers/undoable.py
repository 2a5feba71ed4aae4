"""Changes to a model that can be undone: the attention of its language model, hooks, and methods of this one model."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .attention import ENABLED, IMPLEMENTATION

_HOOK = "videoanchor"


def set_attention(model: PreTrainedModel, text: PreTrainedModel, undo: ExitStack) -> None:
    """Sets the attention of the language model, a part of `model`, to ours, which runs with a gate only from now on."""
    ENABLED[id(text.config)] = text.config
    undo.callback(ENABLED.pop, id(text.config), None)
    previous = text.config._attn_implementation
    if previous == IMPLEMENTATION:
        return
    key = next((key for key in model.config.sub_configs if getattr(model.config, key) is text.config), None)
    if key is None:
        raise ValueError(
            f"cannot find the language model's config in {type(model.config).__name__}: load the model with "
            f"attn_implementation={IMPLEMENTATION!r}"
        )
    model.set_attn_implementation({key: IMPLEMENTATION})
    undo.callback(lambda: model.set_attn_implementation({key: previous}))  # pyright: ignore[reportArgumentType]
    if text.config._attn_implementation != IMPLEMENTATION:
        raise ValueError(
            f"{type(text).__name__} did not take the attention {IMPLEMENTATION!r}: load the model with "
            f"attn_implementation={{{key!r}: {IMPLEMENTATION!r}}}"
        )


def replace_method(model: PreTrainedModel, name: str, around: Callable[..., Any], undo: ExitStack) -> None:
    """Replaces a method of this one model by `around(method, ...)`."""
    original = getattr(model, name, None)
    if original is None:
        return
    if name in vars(model):
        undo.callback(setattr, model, name, original)
    else:
        undo.callback(delattr, model, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(model, name, wrapped)


def add_hook(hook: RemovableHandle, undo: ExitStack) -> None:
    """Gives a hook, just registered, an id that is the same each time. torch.compile looks at the ids of hooks: with
    others it would compile decoding again for each `enable`, and after eight of them compile no more."""
    for hooks in (hook.hooks_dict_ref(), *(extra() for extra in hook.extra_dict_ref)):
        if hooks is not None and hook.id in hooks:
            hooks[_HOOK] = hooks.pop(hook.id)
    hook.id = _HOOK  # pyright: ignore[reportAttributeAccessIssue]
    undo.callback(hook.remove)
