"""Options that several commands share, as frozen dataclasses, and their expansion into flags.

A command has a parameter such as `loading: Loading`; `expanded` turns each field of it into a flag.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from typer import Option

from haast.drafters.tree_shape import DraftShape, default_nodes, shape_for
from haast.errors import check_at_least as check_at_least  # re-exported for commands
from haast.errors import expanded as expanded_path

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from haast.core import SamplingParams
    from haast.drafters.eagle import EagleDrafter
    from haast.drafters.medusa import MedusaDrafter
    from haast.formats.opened import OpenedHead
    from haast.heads.checkpoint import Head
    from haast.target.device_map import Placement
    from haast.target.target import Target
    from haast.tuning.calibration import Calibration

DEFAULT_MODEL = "smollm2-135m-instruct"  # a copy of haast.target.load's, whose import would import torch
PREFILL_CHUNK = 512  # a copy of haast.engine.engine's

JsonOption = Annotated[
    str | None, Option("--json", metavar="OUT", help="Write the result to this file; '-' is stdout.")
]
PromptsOption = Annotated[Path | None, Option("--prompts", metavar="FILE", help="JSON lines with `turns` or `prompt`.")]
KVDtypeOption = Annotated[
    str,
    Option(
        "--kv-dtype",
        help="Dtype of stored keys and values: auto (the model's), float16 or bfloat16, which make many answers at a "
        "time faster.",
    ),
]
LimitOption = Annotated[int | None, Option("--limit", metavar="N", help="Use only the first N prompts.")]
ChunkOption = Annotated[
    int, Option("--prefill-chunk", metavar="N", help="Prompt tokens per forward; fewer need less memory.")
]
SpreadLimitOption = Annotated[
    int | None, Option("--limit", metavar="N", help="Use only N prompts, evenly spaced over the file.")
]


@dataclass(frozen=True)
class Loading:
    """The target, and how to load it."""

    model: Annotated[str, Option(help="Target: name, hub id, folder or .gguf file.")] = DEFAULT_MODEL
    dtype: Annotated[str, Option(help="float32, float16, bfloat16 or float64.")] = "float32"
    device: Annotated[str, Option(help="A torch device, such as cpu or cuda:0.")] = "cpu"
    packing: Annotated[
        str,
        Option(help="Weight format: auto, gguf (as in the file), f16, int8 (CPU), torchao-int8, torchao-int4, off."),
    ] = "auto"
    compile: Annotated[str, Option(help="torch.compile of the layers: off, auto (on for CUDA) or on.")] = "off"
    threads: Annotated[int | None, Option(metavar="N", help="CPU threads; torch's default if absent.")] = None

    def check(self) -> None:
        """Check the settings without loading, and set the number of threads. Raises ValueError."""
        if self.threads is not None:
            check_at_least("threads", self.threads)
        import torch

        from haast.target.load import check_compile, check_precision, resolve

        check_precision(self.dtype, self.device, self.packing)
        check_compile(self.compile, self.dtype, self.device, self.packing)
        resolve(self.model)
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def load(self, placement: Placement | None = None) -> Target:
        """Load the target. Raises ValueError."""
        from haast.target.load import load_target

        options = {"dtype": self.dtype, "device": self.device, "packing": self.packing, "compile": self.compile}
        return load_target(self.model, **options, progress=compiling, placement=placement)


@dataclass(frozen=True)
class Choice:
    """The drafter."""

    drafter: Annotated[
        str,
        Option(
            help="auto, eagle, eagle+suffix, block, block+suffix, suffix, lookup, lookahead, medusa, small-model, or "
            "none. auto is eagle+suffix with an EAGLE head, else suffix."
        ),
    ] = "auto"
    small_model: Annotated[str | None, Option(metavar="NAME", help="Draft model for --drafter small-model.")] = None
    corpus: Annotated[
        Path | None,
        Option(metavar="FILE", help="Also draft from earlier answers: a file that grows with what is generated."),
    ] = None

    def check(self) -> None:
        """Raise ValueError if the options contradict each other."""
        if self.small_model is not None and self.drafter not in ("auto", "small-model"):
            raise ValueError(
                f"--small-model is for drafter='small-model', not for drafter={self.drafter!r}: leave one out"
            )


@dataclass(frozen=True)
class Drafting:
    """The head, and the shape of its draft trees."""

    head: Annotated[
        str,
        Option(
            help="Head: folder, hub id or .gguf file; 'default' for the shipped one, 'mtp' for the one in the target's "
            "checkpoint, 'none' for no head."
        ),
    ] = "default"
    shape: Annotated[str, Option(help="Kind of draft tree: dynamic, static or chain.")] = DraftShape.kind
    nodes: Annotated[int | None, Option(metavar="N", help="Nodes per tree, root included; tuned if absent.")] = None
    depth: Annotated[int | None, Option(metavar="N", help="Levels below the root; by --nodes if absent.")] = None
    draft_top_k: Annotated[int | None, Option(metavar="N", help="Children per node; by --nodes if absent.")] = None
    width: Annotated[int | None, Option(metavar="N", help="Nodes expanded per level; by --nodes if absent.")] = None
    draft_window: Annotated[
        int | None, Option(metavar="W", help="Positions that the head attends to; the whole text if absent.")
    ] = None
    calibration: Annotated[
        str, Option(metavar="FILE", help="auto (measured on this machine), off, or a file of `haast calibrate`.")
    ] = "auto"

    @property
    def shaped(self) -> bool:
        """Whether the user set the tree shape, which then overrides calibration."""
        sizes = (self.nodes, self.depth, self.draft_top_k, self.width)
        return self.shape != DraftShape.kind or any(size is not None for size in sizes)

    def check(self, model: str, device: str) -> DraftShape:
        """Check the shape and the head's files before the target loads, and return the shape.

        Raises ValueError for a setting, HeadMismatchError for a missing head or one for another model.
        """
        shape = self.check_shape(device)
        if self.draft_window is not None:
            check_at_least("draft_window", self.draft_window)
        if not self.calibration:
            raise ValueError("calibration='' is empty: give auto, off or a file of `haast calibrate`")
        if self.calibration not in ("auto", "off"):
            if self.shaped:
                raise ValueError(
                    "--calibration FILE sets the tree shape: leave out --shape, --nodes, --depth, --draft-top-k and "
                    "--width"
                )
            from haast.tuning.calibration import Calibration

            Calibration.load(expanded_path(self.calibration, "no calibration at"))
        folder = self.folder(model)
        if folder is not None:
            from haast.formats.opened import check_files, drafter_kind

            if self.draft_window is not None and drafter_kind(folder) == "medusa":
                raise ValueError("--draft-window needs an EAGLE head, and --head has Medusa heads: leave it out")
            check_files(folder, text_config(model), model)
        return shape

    def check_shape(self, device: str) -> DraftShape:
        """The tree shape of these settings. Raises ValueError. Imports nothing heavy."""
        nodes = default_nodes(device) if self.nodes is None else self.nodes
        return shape_for(nodes, self.shape, self.depth, self.draft_top_k, self.width)

    def folder(self, model: str) -> Path | None:
        """The head's folder; None for 'none'. Raises ValueError if 'default' does not exist for the model."""
        from haast.drafters.factory import find_head

        return find_head(None if self.head == "none" else self.head, model)

    def load(self, target: Target, model: str, shape: DraftShape) -> EagleDrafter | MedusaDrafter | None:
        """The head's drafter, without a drafting policy; None without a head. Raises HeadMismatchError."""
        from haast.drafters.eagle import EagleDrafter
        from haast.drafters.factory import head_drafter, open_head, tune_eagle

        head = fitted_head(open_head(self.folder(model), model), target)
        if head is None:
            return None
        drafter = head_drafter(target, head, shape, self.draft_window)
        if isinstance(drafter, EagleDrafter) and not self.shaped:
            tune_eagle(target, drafter, self.calibration)
        return drafter

    def calibrated(self, target: Target, drafter: EagleDrafter | None) -> Calibration | None:
        """The calibration of this machine; None if there is none, or if the user set a shape."""
        from haast.drafters.calibrated import find_calibration

        return None if drafter is None or self.shaped else find_calibration(target, drafter, self.calibration)


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters."""

    temperature: Annotated[float, Option(metavar="T", help="Sampling temperature; 0 is greedy.")] = 0.0
    top_k: Annotated[int, Option(metavar="K", help="Keep the K most likely tokens; 0 is off.")] = 0
    top_p: Annotated[float, Option(metavar="P", help="Keep the most likely tokens of total mass P; 1 is off.")] = 1.0
    min_p: Annotated[float, Option(metavar="P", help="Drop tokens less likely than P times the best; 0 is off.")] = 0.0
    repetition_penalty: Annotated[float, Option(metavar="X", help="Above 1 penalises repeated tokens; 1 is off.")] = 1.0
    seed: Annotated[int, Option(metavar="S", help="The same seed gives the same text, with or without drafts.")] = 0

    def check(self) -> SamplingParams:
        """The library's parameters for these options. Raises ValueError."""
        from haast.core import SamplingParams

        return SamplingParams(**vars(self))


@contextmanager
def compiling(what: str) -> Iterator[None]:
    """Show a line on stderr while `what` is compiled, if stderr is a terminal."""
    shown, start = sys.stderr.isatty(), perf_counter()
    if shown:
        print(f"haast: compiling {what} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print(f" {perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def fitted_head(head: Head | OpenedHead | None, target: Target) -> Head | None:
    """The head, ready to draft. For a foreign head, measures open conventions, with a message on stderr."""
    from haast.formats.opened import OpenedHead
    from haast.progress import Progress

    if not isinstance(head, OpenedHead):
        return head
    print(f"{head.summary}; measuring it; `haast import` saves the result", file=sys.stderr)
    with Progress("measuring the head") as progress:
        return head.fitted(target, report=progress.set_status)[0]


def text_config(model: str) -> PretrainedConfig | None:
    """The text configuration of a model that is on this machine; None if it can't be read before loading."""
    from haast.target.load import local_config, resolve

    resolve(model)  # a model that does not exist is an error here
    try:
        config = local_config(model)
    except ValueError:
        return None  # loading the model will report the error
    return None if config is None else config.get_text_config()


def expanded(function: Callable[..., None]) -> Callable[..., None]:
    """Replace every dataclass parameter of the command by one option per field."""
    hints = get_type_hints(function, include_extras=True)
    groups = {name: kind for name, kind in hints.items() if is_dataclass(kind) and isinstance(kind, type)}

    @functools.wraps(function)
    def command(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
        function(**values)

    parameters = list[inspect.Parameter]()
    for name, parameter in inspect.signature(function).parameters.items():
        single = parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        parameters += _options(groups[name]) if name in groups else [single]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del command.__wrapped__
    return command


def _options(kind: type[Any]) -> list[inspect.Parameter]:
    hints, options = get_type_hints(kind, include_extras=True), []
    for field in fields(kind):
        assert field.default is not MISSING, "an option group's fields have defaults"
        annotation, keyword = hints[field.name], inspect.Parameter.KEYWORD_ONLY
        if "help" in field.metadata:  # a configuration class of the library, which does not import typer
            annotation = Annotated[annotation, Option(help=field.metadata["help"])]
        options.append(inspect.Parameter(field.name, keyword, default=field.default, annotation=annotation))
    return options
