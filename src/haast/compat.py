"""Everything private that Haast touches of transformers and torch. No other file of Haast does; a test sees to it.

Each function says what it touches, why there is no public way, in which versions it is there, and what fails when it
goes. tests/test_compat.py tries each by itself, docs/versions.md lists them. Knows no decoding.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import torch
from accelerate.hooks import ModelHook
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor

_READER = "_extract_generation_mode_kwargs"  # the method of transformers that asks for a callable's signature
_FRAMES = 16  # between it and us stand a few of `inspect`


def attention_name(config: PreTrainedConfig) -> str | None:
    """The attention implementation that a model with this configuration runs.

    Touches: `PreTrainedConfig._attn_implementation`. Public: only the choice. There: transformers 5.0 and newer.
    Fails without it: giving a model back as it was after `generate`, and fusing Llama's attention.
    """
    name: str | None = config._attn_implementation
    return name


def set_attention_name(config: PreTrainedConfig, name: str | None) -> None:
    """Choose the attention of modules that are no whole model (a head's layers), or that a model had before.

    Touches: `PreTrainedConfig._attn_implementation`. There: transformers 5.0 and newer.
    Public: `set_attn_implementation`, which needs a whole model, checks the name anew, and may load a kernel for it.
    Fails without it: heads run transformers' own attention, which takes no tree; a model keeps Haast's attention.
    """
    config._attn_implementation = name


def takes_registered_attention(model: PreTrainedModel) -> bool:
    """Whether the model calls a registered attention function, and that with scores and softmax as sdpa has them.

    Touches: `PreTrainedModel._supports_sdpa`. There: transformers 5.0 and newer.
    Public: only whether it calls a registered function at all. Fails without it: every target, at loading.
    """
    kind: Any = type(model)
    return bool(kind._supports_sdpa and kind.is_backend_compatible())


def carries_state(model: PreTrainedModel) -> bool:
    """Whether the model has a recurrent state beside or instead of keys and values (Mamba, RWKV, ...).

    Touches: `PreTrainedModel._is_stateful`. Public: nothing. There: transformers 5.0 and newer.
    Fails without it: only the reason in the refusal; the probe of a target still sees that no cache is used.
    """
    return bool(getattr(type(model), "_is_stateful", False))


def usual_settings() -> dict[str, Any]:
    """Every setting of a GenerationConfig with what `generate` fills in where nobody gives it; None for nothing.

    Touches: `GenerationConfig._get_default_generation_params`. There: transformers 5.0 and newer.
    Public: `GenerationConfig()`, whose settings are None. Fails without it: refusing unknown settings.
    """
    config: Any = GenerationConfig()  # type: ignore[no-untyped-call]
    return {**vars(config), **config._get_default_generation_params()}


def prepared_pad_token(config: GenerationConfig) -> int | None:
    """The pad token that `generate` has made up its mind to use, where the user gave none; None where there is none.

    Touches: `GenerationConfig._pad_token_tensor`. There: transformers 5.0 and newer.
    Public: `pad_token_id`, which `generate` leaves at None when it takes the first end token instead.
    Fails without it: batches without `pad_token_id`.
    """
    token: Any = config._pad_token_tensor
    return None if token is None else int(token)


def allowed_tokens_function(processor: PrefixConstrainedLogitsProcessor) -> Callable[[int, Tensor], list[int]]:
    """The user's `prefix_allowed_tokens_fn`, as the processor holds it.

    Touches: `PrefixConstrainedLogitsProcessor._prefix_allowed_tokens_fn`. There: transformers 5.0 and newer.
    Public: nothing; the processor itself counts the rows of what it is given, and Haast gives it one row at a time.
    Fails without it: `generate(prefix_allowed_tokens_fn=...)` with Haast.
    """
    function: Callable[[int, Tensor], list[int]] = processor._prefix_allowed_tokens_fn
    return function


def hand_over(known: Iterable[str], caches: Iterable[str]) -> dict[str, Any] | None:
    """Put back what `generate` keeps from a callable `custom_generate`; to be called while it reads our signature.

    `generate` takes `streamer`, `tokenizer`, `assistant_model`, `assistant_tokenizer` and `synced_gpus` out of its
    arguments and passes on only what the callable's signature names and is still there. So a streamer would wait
    forever, an assistant would be ignored, stop strings would find no tokenizer. They go back among the arguments as
    one, `handover`, where the very next line looks for it. With them go a cache of the user's (an argument by one of
    the names `caches`), which later looks like the one that `generate` makes, and every parameter of `generate` that is
    not among `known` and was given: a newer transformers may have some that never reach a decoding method. Returns all
    that `generate` was given, by name, the model as `self`; None where nobody reads our signature.

    Touches: the local variables of `GenerationMixin._extract_generation_mode_kwargs` and of its caller, `generate`.
    Public: nothing.
    There: transformers 5.0 and newer; one that has another way, or passes all by itself, is left alone.
    Fails without it: streamers and stop strings with Haast; an assistant is ignored instead of refused.
    """
    frame = _reading()
    if frame is None or frame.f_back is None:
        return None
    taken: dict[str, Any] = dict(frame.f_locals["generation_mode_kwargs"])
    left: dict[str, Any] = frame.f_locals["kwargs"]
    if "tokenizer" in taken:
        left["tokenizer"] = taken["tokenizer"]  # `generate` itself needs it for the stop strings
    taken.update({name: left[name] for name in caches if left.get(name) is not None})
    given = frame.f_back.f_locals
    for name, parameter in inspect.signature(GenerationMixin.generate).parameters.items():
        if name in given and name not in known and given[name] is not parameter.default:
            taken[name] = given[name]
    asked: dict[str, Any] = {name: given.get(name) for name in ("self", "inputs", "generation_config")}
    asked.update(left)
    left["handover"] = taken
    return asked


def _reading() -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame is None or frame.f_code.co_name == _READER:
            return frame
        frame = frame.f_back
    return None


def foreign_hooks(modules: Iterable[nn.Module]) -> int:
    """Hooks that stand on the modules and may change what they say. transformers' own, which collect states, do not.

    Touches: `torch.nn.Module._forward_hooks`, `_forward_pre_hooks`. Public: no asking. There: torch 2.6 and newer.
    Fails without it: loading a packed model; before that was asked, a user's hook on a layer went unheard.
    """
    hooks = [hook for m in modules for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return sum(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own buffers by name, as it holds them.

    Touches: `torch.nn.Module._buffers`. Public: attributes, a third of a microsecond each, in forwards of a few.
    There: torch 2.6 and newer. Fails without it: packed linears.
    """
    return module._buffers


def weights_state(module: nn.Module) -> list[tuple[int, int]]:
    """Where each parameter and buffer lies, and how often it was written to; it differs once one has been changed.

    Touches: `Tensor._version`. Public: nothing. There: torch 2.6 and newer; tensors of inference mode have none.
    Fails without it: a `Session` goes on with keys and values of weights that have changed since.
    """
    tensors = (*module.parameters(), *module.buffers())
    return [(_address(each), 0 if each.is_inference() else each._version) for each in tensors]


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # made of other tensors (torchao), or with nothing in memory
        return 0


def with_own_parameters(module: nn.Module) -> nn.Module:
    """A copy of a module that shares its parameters, and whose parameters can be set without setting the module's.

    Touches: `torch.nn.Module._parameters`. There: torch 2.6 and newer.
    Public: `copy.copy`, whose result holds the very dict, and `copy.deepcopy`, which copies the weights.
    Fails without it: heads for targets that are cut over processes.
    """
    made = copy.copy(module)
    made._parameters = dict(module._parameters)
    return made


def accelerate_hook(module: nn.Module) -> ModelHook | None:
    """What accelerate has hung on the module, to move its inputs or to page its weights in; None for nothing.

    Touches: the attribute `_hf_hook`. Public: adding and removing. There: accelerate 1.2 and newer.
    Fails without it: targets over several devices (`device_map`).
    """
    hook: ModelHook | None = vars(module).get("_hf_hook")
    return hook


def mark_static(tensor: Tensor) -> None:
    """Promise that the tensor stays where it is, so that CUDA graphs read and write it in place.

    Touches: `torch._dynamo.mark_static_address`. Public: nothing. There: torch 2.6 and newer.
    Fails without it: compiled layers on CUDA (each replay would copy the cache).
    """
    torch._dynamo.mark_static_address(tensor, guard=False)


def variants_allowed(most: int) -> AbstractContextManager[None]:
    """While it lasts, torch compiles up to so many versions of one function, before it gives up on it.

    Touches: `torch._dynamo.config`, its `recompile_limit`, `accumulated_recompile_limit` (`cache_size_limit` in 2.6).
    Public: nothing with a scope. There: torch 2.6 and newer. Fails without it: compiled layers.
    """
    name = "recompile_limit" if torch.__version__ >= "2.7" else "cache_size_limit"
    limits = {name: most, f"accumulated_{name}": most}
    patched: AbstractContextManager[None] = torch._dynamo.config.patch(limits)
    return patched


def default_code_folder() -> str:
    """Where torch keeps compiled code unless it is told another place; it writes this into the environment itself.

    Touches: `torch._inductor.runtime.cache_dir_utils.default_cache_dir`. There: torch 2.6 and newer.
    Public: TORCHINDUCTOR_CACHE_DIR, which does not tell who has set it. Fails without it: compiled layers.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # seconds, if nobody compiles

    folder: str = default_cache_dir()
    return folder
