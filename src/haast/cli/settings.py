"""Options that several commands share, as frozen dataclasses, and their expansion into flags.

A command takes `loading: Loading`, say, and `expanded` gives it one flag per field.
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
from haast.errors import check_at_least as check_at_least  # commands take it from here
from haast.errors import expanded as expanded_path

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from haast.core import SamplingParams
    from haast.drafters.eagle import EagleDrafter
    from haast.drafters.medusa import MedusaDrafter
    from haast.formats.opened import OpenedHead
    from haast.heads.checkpoint import Head
    from haast.target.device_map import Spread
    from haast.target.target import Target
    from haast.tuning.calibration import Calibration

DEFAULT_MODEL = "smollm2-135m-instruct"  # haast.target.load has the same; importing it would import torch
PREFILL_CHUNK = 512  # of haast.engine.engine, likewise

JsonOption = Annotated[
    str | None, Option("--json", metavar="OUT", help="Write the result to this file; '-' is stdout.")
]
PromptsOption = Annotated[Path | None, Option("--prompts", metavar="FILE", help="JSON lines with `turns` or `prompt`.")]
LimitOption = Annotated[int | None, Option("--limit", metavar="N", help="Take only the first N prompts.")]
ChunkOption = Annotated[
    int, Option("--prefill-chunk", metavar="N", help="Prompt tokens a forward; fewer take less memory.")
]
SpreadLimitOption = Annotated[
    int | None, Option("--limit", metavar="N", help="Take only N prompts, evenly from the whole file.")
]


@dataclass(frozen=True)
class Loading:
    """Which target, and how it is loaded."""

    model: Annotated[str, Option(help="Name, hub id, folder or .gguf file.")] = DEFAULT_MODEL
    dtype: Annotated[str, Option(help="float32, float16, bfloat16 or float64.")] = "float32"
    device: Annotated[str, Option(help="A torch device.")] = "cpu"
    packing: Annotated[str, Option(help="auto, f16 (packed, on the CPU), int8, torchao-int8, torchao-int4 or off.")] = (
        "auto"
    )
    compile: Annotated[str, Option(help="off, auto (on for CUDA) or on: static shapes, kept on disk.")] = "off"
    threads: Annotated[int | None, Option(metavar="N", help="CPU threads; torch's own choice if absent.")] = None

    def check(self) -> None:
        """Refuse impossible settings and apply the thread count; nothing is loaded. Raises ValueError."""
        if self.threads is not None:
            check_at_least("threads", self.threads)
        import torch

        from haast.target.load import check_compile, check_precision, resolve

        check_precision(self.dtype, self.device, self.packing)
        check_compile(self.compile, self.dtype, self.device, self.packing)
        resolve(self.model)
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def load(self, spread: Spread | None = None) -> Target:
        """Load the target. Raises ValueError."""
        from haast.target.load import load_target

        how = {"dtype": self.dtype, "device": self.device, "packing": self.packing, "compile": self.compile}
        return load_target(self.model, **how, progress=compiling, spread=spread)


@dataclass(frozen=True)
class Choice:
    """Who drafts."""

    drafter: Annotated[
        str,
        Option(
            help="auto, eagle, eagle+suffix, suffix, lookup, lookahead, medusa, small-model, or none. auto is the best "
            "there is: eagle+suffix with an EAGLE head, suffix without one."
        ),
    ] = "auto"
    small_model: Annotated[str | None, Option(metavar="NAME", help="The smaller model that drafts.")] = None

    def check(self) -> None:
        """Refuse what is no drafter. Raises ValueError."""
        if self.small_model is not None and self.drafter not in ("auto", "small-model"):
            raise ValueError(f"--small-model drafts for 'small-model', not for drafter={self.drafter!r}: leave one out")


@dataclass(frozen=True)
class Drafting:
    """Which head, and how far and wide it drafts."""

    head: Annotated[
        str, Option(help="A head's folder, hub id or .gguf file; 'default' is the shipped one, 'none' uses none.")
    ] = "default"
    shape: Annotated[str, Option(help="dynamic, static or chain.")] = DraftShape.kind
    nodes: Annotated[int | None, Option(metavar="N", help="Tree budget, root included; by what pays here.")] = None
    depth: Annotated[int | None, Option(metavar="N", help="Levels below the root; by the budget.")] = None
    draft_top_k: Annotated[int | None, Option(metavar="N", help="Children per node; by the budget.")] = None
    width: Annotated[int | None, Option(metavar="N", help="Nodes expanded per level; by the budget.")] = None
    draft_window: Annotated[
        int | None, Option(metavar="W", help="Positions that the head looks back; all of the text if absent.")
    ] = None
    calibration: Annotated[str, Option(metavar="FILE", help="auto: what was measured here; off; a file.")] = "auto"

    @property
    def shaped(self) -> bool:
        """Whether the user asked for a shape, which no calibration then replaces."""
        sizes = (self.nodes, self.depth, self.draft_top_k, self.width)
        return self.shape != DraftShape.kind or any(size is not None for size in sizes)

    def check(self, model: str, device: str) -> DraftShape:
        """Refuse an impossible shape, a head that is not there, or one for another model where its config says so.

        Raises ValueError for a setting, HeadMismatchError for the head.
        """
        shape = self.check_shape(device)
        if self.draft_window is not None:
            check_at_least("draft_window", self.draft_window)
        if not self.calibration:
            raise ValueError("calibration='' names no file: give auto, off or what `haast calibrate` wrote")
        if self.calibration not in ("auto", "off"):
            if self.shaped:
                raise ValueError(
                    "--calibration brings a shape of its own: leave out --shape, --nodes, --depth, --width"
                )
            from haast.tuning.calibration import Calibration

            Calibration.load(expanded_path(self.calibration, "no calibration at"))
        folder = self.folder(model)
        if folder is not None:
            from haast.formats.opened import check_files, draws_as

            if self.draft_window is not None and draws_as(folder) == "medusa":
                raise ValueError("--draft-window is for EAGLE heads, and --head names Medusa heads: leave it out")
            check_files(folder, text_config(model), model)
        return shape

    def check_shape(self, device: str) -> DraftShape:
        """The shape that the settings name. Raises ValueError; imports nothing."""
        nodes = default_nodes(device) if self.nodes is None else self.nodes
        return shape_for(nodes, self.shape, self.depth, self.draft_top_k, self.width)

    def folder(self, model: str) -> Path | None:
        """Where the head lies; None for 'none'. Raises ValueError where 'default' names none."""
        from haast.drafters.factory import find_head

        return find_head(None if self.head == "none" else self.head, model)

    def load(self, target: Target, model: str, shape: DraftShape) -> EagleDrafter | MedusaDrafter | None:
        """A head's own drafter, without a policy; None without a head. Raises HeadMismatchError."""
        from haast.drafters.eagle import EagleDrafter
        from haast.drafters.factory import head_drafter, open_head, tune_eagle

        head = fitted(open_head(self.folder(model), model), target)
        if head is None:
            return None
        drafter = head_drafter(target, head, shape, self.draft_window)
        if isinstance(drafter, EagleDrafter) and not self.shaped:
            tune_eagle(target, drafter, self.calibration)
        return drafter

    def calibrated(self, target: Target, drafter: EagleDrafter | None) -> Calibration | None:
        """The calibration of this machine, where there is one and no shape was asked for."""
        from haast.drafters.calibrated import find_calibration

        return None if drafter is None or self.shaped else find_calibration(target, drafter, self.calibration)


@dataclass(frozen=True)
class Sampling:
    """The distribution of the next token."""

    temperature: Annotated[float, Option(metavar="T", help="0 is greedy.")] = 0.0
    top_k: Annotated[int, Option(metavar="K", help="Keep the K likeliest tokens; 0 is off.")] = 0
    top_p: Annotated[float, Option(metavar="P", help="Keep the likeliest tokens of mass P; 1 is off.")] = 1.0
    min_p: Annotated[float, Option(metavar="P", help="Drop tokens below P times the best; 0 is off.")] = 0.0
    repetition_penalty: Annotated[float, Option(metavar="X", help="1 is off.")] = 1.0
    seed: Annotated[int, Option(metavar="S", help="Same seed, same text, with or without drafting.")] = 0

    def check(self) -> SamplingParams:
        """The library's own configuration. Raises ValueError."""
        from haast.core import SamplingParams

        return SamplingParams(**vars(self))


@contextmanager
def compiling(what: str) -> Iterator[None]:
    """A line on stderr while something is compiled, where somebody reads along."""
    shown, begun = sys.stderr.isatty(), perf_counter()
    if shown:
        print(f"haast: compiling {what} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print(f" {perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)


def fitted(head: Head | OpenedHead | None, target: Target) -> Head | None:
    """A head ready to draft; of a foreign one it is said what was found, and that it is measured."""
    from haast.formats.opened import OpenedHead
    from haast.progress import Progress

    if not isinstance(head, OpenedHead):
        return head
    print(f"{head.summary}; `haast import` keeps what is measured now", file=sys.stderr)
    with Progress("measuring the head") as progress:
        return head.fitted(target, say=progress.say)[0]


def text_config(model: str) -> PretrainedConfig | None:
    """The text configuration of a model, where it is on this machine; None where only loading tells."""
    from transformers import AutoConfig

    from haast.target.load import config_on_disk

    folder = config_on_disk(model)
    try:
        return None if folder is None else AutoConfig.from_pretrained(folder).get_text_config()
    except (OSError, KeyError, ValueError):
        return None  # loading the model tells what is wrong with it


def expanded(function: Callable[..., None]) -> Callable[..., None]:
    """The command with every dataclass parameter replaced by one option per field."""
    hints = get_type_hints(function, include_extras=True)
    groups = {name: kind for name, kind in hints.items() if is_dataclass(kind) and isinstance(kind, type)}

    @functools.wraps(function)
    def command(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
        function(**values)

    parameters = list[inspect.Parameter]()
    for name, parameter in inspect.signature(function).parameters.items():
        own = parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        parameters += _options(groups[name]) if name in groups else [own]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del command.__wrapped__
    return command


def _options(kind: type[Any]) -> list[inspect.Parameter]:
    hints, made = get_type_hints(kind, include_extras=True), []
    for field in fields(kind):
        assert field.default is not MISSING, "an option group's fields have defaults"
        annotation, keyword = hints[field.name], inspect.Parameter.KEYWORD_ONLY
        if "help" in field.metadata:  # a configuration of the library, which knows no typer
            annotation = Annotated[annotation, Option(help=field.metadata["help"])]
        made.append(inspect.Parameter(field.name, keyword, default=field.default, annotation=annotation))
    return made
