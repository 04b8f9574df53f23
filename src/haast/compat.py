"""All uses of private names of transformers, torch and accelerate. No other file of Haast has any; a test checks this.

Each docstring has the private names (Touches), the reason why no public one will do (Public), the versions that have
them (There), and what breaks when they are removed (Fails without it). tests/api/test_compat.py tests each function
alone, docs/versions.md lists them. Knows nothing of decoding.
"""

from __future__ import annotations

import copy
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, Protocol

import gguf
import numpy as np
import torch
from accelerate.hooks import ModelHook
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor

_READS_SIGNATURE = "_extract_generation_mode_kwargs"  # the method of transformers that reads a callable's signature
_MAX_FRAMES = 16  # frames to search for it; between it and Haast are a few of `inspect`


def attention_name(config: PreTrainedConfig) -> str | None:
    """The attention implementation of a model with this configuration.

    Touches: `PreTrainedConfig._attn_implementation`. Public: only setting it. There: transformers 5.0 and newer.
    Fails without it: restoring a model after `generate`, and fusing Llama's attention.
    """
    name: str | None = config._attn_implementation
    return name


def set_attention_name(config: PreTrainedConfig, name: str | None) -> None:
    """Set the attention of modules that are not a whole model (a head's layers), or restore a model's former one.

    Touches: `PreTrainedConfig._attn_implementation`. There: transformers 5.0 and newer.
    Public: `set_attn_implementation`, which needs a whole model, checks the name again, and may load a kernel for it.
    Fails without it: heads run transformers' own attention, which takes no tree mask; a model keeps Haast's attention.
    """
    config._attn_implementation = name


def experts_name(config: PreTrainedConfig) -> str | None:
    """How a model with this configuration multiplies by its experts: "grouped_mm", "eager", ...; None if not chosen.

    Touches: `PreTrainedConfig._experts_implementation`. Public: `get_experts_implementation`, which needs a model.
    There: transformers 5.0 and newer; None in a version without it.
    Fails without it: MTP heads with experts for a target in fp64, which grouped products do not know.
    """
    name: str | None = getattr(config, "_experts_implementation", None)
    return name


def takes_registered_attention(model: PreTrainedModel) -> bool:
    """Whether the model calls a registered attention function, with the scores and softmax of sdpa.

    Touches: `PreTrainedModel._supports_sdpa`. There: transformers 5.0 and newer.
    Public: only whether it calls a registered function at all. Fails without it: every target, at loading.
    """
    kind: Any = type(model)
    return bool(kind._supports_sdpa and kind.is_backend_compatible())


def is_stateful(model: PreTrainedModel) -> bool:
    """Whether the model has a recurrent state in addition to or instead of keys and values (Mamba, RWKV, ...).

    Touches: `PreTrainedModel._is_stateful`. Public: nothing. There: transformers 5.0 and newer.
    Fails without it: only the reason in the error message; the target's probe still detects that no cache is used.
    """
    return bool(getattr(type(model), "_is_stateful", False))


def default_generation_settings() -> dict[str, Any]:
    """All settings of a GenerationConfig with the defaults that `generate` fills in; None for no default.

    Touches: `GenerationConfig._get_default_generation_params`. There: transformers 5.0 and newer.
    Public: `GenerationConfig()`, whose settings are None. Fails without it: refusing unknown settings.
    """
    config: Any = GenerationConfig()  # type: ignore[no-untyped-call]
    return {**vars(config), **config._get_default_generation_params()}


def prepared_pad_token(config: GenerationConfig) -> int | None:
    """The pad token that `generate` has chosen if the user gave none; None if there is none.

    Touches: `GenerationConfig._pad_token_tensor`. There: transformers 5.0 and newer.
    Public: `pad_token_id`, which `generate` leaves at None when it takes the first end token instead.
    Fails without it: batches without `pad_token_id`.
    """
    token: Any = config._pad_token_tensor
    return None if token is None else int(token)


def allowed_tokens_function(processor: PrefixConstrainedLogitsProcessor) -> Callable[[int, Tensor], list[int]]:
    """The user's `prefix_allowed_tokens_fn`, as the processor holds it.

    Touches: `PrefixConstrainedLogitsProcessor._prefix_allowed_tokens_fn`. There: transformers 5.0 and newer.
    Public: nothing; the processor itself counts the rows of its input, but Haast passes it one row at a time.
    Fails without it: `generate(prefix_allowed_tokens_fn=...)` with Haast.
    """
    function: Callable[[int, Tensor], list[int]] = processor._prefix_allowed_tokens_fn
    return function


def recover_arguments(known: Iterable[str], caches: Iterable[str]) -> dict[str, Any] | None:
    """Recover arguments that `generate` withholds from a callable `custom_generate`.

    Call it while `generate` reads the callable's signature. `generate` removes `streamer`, `tokenizer`,
    `assistant_model`, `assistant_tokenizer` and `synced_gpus` from its arguments and passes on only what remains and is
    in the callable's signature. Then a streamer would wait forever, an assistant would be ignored, and stop strings
    would find no tokenizer. This function adds them to the arguments as one, `handover`, which the next line of
    `generate` looks up. `handover` also has the user's cache (an argument with one of the names `caches`), which could
    later not be distinguished from one that `generate` creates, and every parameter of `generate` that was passed and
    is not in `known`: a newer transformers may have some that it does not pass to decoding methods. Returns all
    arguments of `generate` by name, the model as `self`; None if `generate` is not reading the signature.

    Touches: the local variables of `GenerationMixin._extract_generation_mode_kwargs` and of its caller, `generate`.
    Public: nothing.
    There: transformers 5.0 and newer; a version that works otherwise, or passes all arguments, is left alone.
    Fails without it: streamers and stop strings with Haast; an assistant is ignored instead of refused.
    """
    frame = _frame_of_generate()
    if frame is None or frame.f_back is None:
        return None
    withheld: dict[str, Any] = dict(frame.f_locals["generation_mode_kwargs"])
    remaining: dict[str, Any] = frame.f_locals["kwargs"]
    if "tokenizer" in withheld:
        remaining["tokenizer"] = withheld["tokenizer"]  # `generate` itself needs it for the stop strings
    withheld.update({name: remaining[name] for name in caches if remaining.get(name) is not None})
    call = frame.f_back.f_locals
    for name, parameter in inspect.signature(GenerationMixin.generate).parameters.items():
        if name in call and name not in known and call[name] is not parameter.default:
            withheld[name] = call[name]
    arguments: dict[str, Any] = {name: call.get(name) for name in ("self", "inputs", "generation_config")}
    arguments.update(remaining)
    remaining["handover"] = withheld
    return arguments


def _frame_of_generate() -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_MAX_FRAMES):
        if frame is None or frame.f_code.co_name == _READS_SIGNATURE:
            return frame
        frame = frame.f_back
    return None


def foreign_hooks(modules: Iterable[nn.Module]) -> int:
    """Number of forward hooks on the modules, except transformers' own, which only collect states.

    Other hooks may change a module's output, so the native stack must not replace the module.
    Touches: `torch.nn.Module._forward_hooks`, `_forward_pre_hooks`. Public: only adding. There: torch 2.6 and newer.
    Fails without it: loading a packed model; without this check a user's hook on a layer would be skipped.
    """
    hooks = [hook for m in modules for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return sum(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own buffers by name (its dict, not a copy).

    Touches: `torch.nn.Module._buffers`. Public: attributes, a third of a microsecond each; a forward takes a few.
    There: torch 2.6 and newer. Fails without it: packed linear layers.
    """
    return module._buffers


def weights_state(module: nn.Module) -> list[tuple[int, int]]:
    """Address and write count of each parameter and buffer. The result changes when one of them changes.

    Touches: `Tensor._version`. Public: nothing. There: torch 2.6 and newer; tensors of inference mode have none.
    Fails without it: a `Session` would reuse keys and values of weights that have changed since.
    """
    tensors = (*module.parameters(), *module.buffers())
    return [(_address(each), 0 if each.is_inference() else each._version) for each in tensors]


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a wrapper of other tensors (torchao), or a tensor without memory
        return 0


def with_own_parameters(module: nn.Module) -> nn.Module:
    """A copy of a module that shares its parameters; replacing one in the copy does not change the original.

    Touches: `torch.nn.Module._parameters`. There: torch 2.6 and newer.
    Public: `copy.copy`, whose result shares the dict itself, and `copy.deepcopy`, which copies the weights.
    Fails without it: heads for targets that are sharded over processes.
    """
    result = copy.copy(module)
    result._parameters = dict(module._parameters)
    return result


def accelerate_hook(module: nn.Module) -> ModelHook | None:
    """accelerate's hook on the module, which moves its inputs or loads offloaded weights; None if there is none.

    Touches: the attribute `_hf_hook`. Public: adding and removing. There: accelerate 1.2 and newer.
    Fails without it: targets over several devices (`device_map`).
    """
    hook: ModelHook | None = vars(module).get("_hf_hook")
    return hook


def mark_static(tensor: Tensor) -> None:
    """Mark the tensor's address as fixed, so that CUDA graphs read and write it in place.

    Touches: `torch._dynamo.mark_static_address`. Public: nothing. There: torch 2.6 and newer.
    Fails without it: compiled layers on CUDA (each replay would copy the cache).
    """
    torch._dynamo.mark_static_address(tensor, guard=False)


def recompile_limits(limit: int) -> AbstractContextManager[None]:
    """Inside the block, torch compiles up to `limit` versions of one function before it stops compiling it.

    Touches: `torch._dynamo.config`, its `recompile_limit`, `accumulated_recompile_limit` (`cache_size_limit` in 2.6).
    Public: nothing with a scope. There: torch 2.6 and newer. Fails without it: compiled layers.
    """
    name = "recompile_limit" if torch.__version__ >= "2.7" else "cache_size_limit"
    limits = {name: limit, f"accumulated_{name}": limit}
    patched: AbstractContextManager[None] = torch._dynamo.config.patch(limits)
    return patched


def default_code_folder() -> str:
    """torch's default folder for compiled code. torch itself writes it to the environment.

    Touches: `torch._inductor.runtime.cache_dir_utils.default_cache_dir`. There: torch 2.6 and newer.
    Public: TORCHINDUCTOR_CACHE_DIR, which may be set by the user or by torch. Fails without it: compiled layers.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # the import takes seconds

    folder: str = default_cache_dir()
    return folder


class GGUFProcessor(Protocol):
    """What transformers does to the tensors of one architecture's GGUF files."""

    def preprocess_name(self, hf_name: str) -> str:
        """The name that a tensor of the model is looked up by."""

    def perform_fallback_tensor_mapping(
        self, gguf_to_hf_name_map: dict[str, str], suffix: str, qual_name: str, hf_name: str
    ) -> None:
        """Add the file's names of a tensor that the gguf package does not name (merged experts)."""

    def process(self, weights: NDArray[Any], name: str, **kwargs: Any) -> Any:
        """A tuple that begins with the values as the model has them, and the name, None if it has stored them."""


def gguf_processor(architecture: str, config: PreTrainedConfig) -> GGUFProcessor:
    """What turns the tensors of a GGUF file into the model's.

    Touches: `transformers.modeling_gguf_pytorch_utils.TENSOR_PROCESSORS`, `TensorProcessor` and the methods of these.
    Public: `from_pretrained(gguf_file=...)`, which dequantises everything. There: transformers 5.0 and newer.
    Fails without it: GGUF files.
    """
    from transformers import modeling_gguf_pytorch_utils as theirs

    kind: Any = theirs.TENSOR_PROCESSORS.get(architecture, theirs.TensorProcessor)
    processor: GGUFProcessor = kind(config=config.to_dict())
    return processor


_READER_LOCK = threading.Lock()


@contextmanager
def quick_gguf_reader(path: Path, metadata: Mapping[str, Any], tensors: Iterable[str]) -> Iterator[None]:
    """Inside the block, transformers takes one GGUF file's metadata and tensor names from the arguments.

    The package's reader takes seconds for a vocabulary, and transformers calls it for the configuration and again for
    the tokenizer. It reads all other files as always, those that other threads open too.
    Touches: `gguf.GGUFReader`, replaced by a subclass that has `fields` and `tensors` as transformers reads them.
    Public: nothing. There: gguf 0.17 and transformers 5.0 and newer.
    Fails without it: nothing, GGUF files load more slowly; sharded ones would miss the names in later shards.
    """
    original: Any = gguf.GGUFReader

    class Reader(original):  # type: ignore[misc]
        def __init__(self, opened: Any, *args: Any, **kwargs: Any) -> None:
            if Path(opened) != path:
                super().__init__(opened, *args, **kwargs)
                return
            self.fields = {key: _gguf_field(value) for key, value in metadata.items()}
            self.tensors = [SimpleNamespace(name=name) for name in tensors]

    package: Any = gguf
    with _READER_LOCK:
        package.GGUFReader = Reader
        try:
            yield
        finally:
            package.GGUFReader = original


def _gguf_field(value: Any) -> SimpleNamespace:
    """A metadata value as gguf's reader has it: one part per element, each a sequence of bytes or of one number."""
    several = isinstance(value, tuple | np.ndarray)
    values = (value.tolist() if isinstance(value, np.ndarray) else value) if several else [value]
    parts = [each.encode() if isinstance(each, str) else (each,) for each in values]
    kinds = {str: 8, bool: 7, float: 12}
    types = ([9] if several else []) + [kinds.get(type(values[0]), 11) if values else 11]
    return SimpleNamespace(types=types, parts=parts, data=range(len(parts)))
