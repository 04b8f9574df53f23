"""Loads prompts, target and drafter for the commands: checks all files and options before the model loads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from haast.cli.settings import Choice, Drafting, Loading, check_at_least, fitted_head

if TYPE_CHECKING:
    from haast.bench.runner import BenchPrompt
    from haast.drafters.base import Drafter
    from haast.drafters.eagle import EagleDrafter
    from haast.drafters.medusa import MedusaDrafter
    from haast.drafters.tree_shape import DraftShape
    from haast.prompts import Prompt
    from haast.target.device_map import Placement
    from haast.target.target import Target

# One per line; used if no prompts are given.
OWN_PROMPTS = tuple((Path(__file__).parents[1] / "data" / "prompts.txt").read_text(encoding="utf-8").splitlines())


@dataclass(frozen=True)
class Spreading:
    """How the target is spread over devices or processes."""

    device_map: Annotated[
        str | None,
        Option(metavar="PLAN", help="auto: let transformers spread the target over devices, memory and disk."),
    ] = None
    tensor_parallel: Annotated[
        bool, Option("--tensor-parallel", help="Under torchrun: split each layer over the processes.")
    ] = False

    def check(self, loading: Loading) -> Placement:
        """The library's configuration for these options. Raises ValueError."""
        from haast.target.device_map import Placement

        placement = Placement(self.device_map, tensor_parallel=self.tensor_parallel)
        placement.check(loading.device, loading.packing, loading.compile)
        return placement


def is_leader(target: Target) -> bool:
    """Whether this process prints results; several may hold one target."""
    return target.ranks is None or target.ranks.leads


@contextmanager
def only_leader_prints(target: Target) -> Iterator[None]:
    """Silence all processes that hold the target except the first."""
    if is_leader(target):
        yield
        return
    with Path(os.devnull).open("w", encoding="utf-8") as devnull, redirect_stdout(devnull), redirect_stderr(devnull):
        yield


def read_prompt_file(path: Path | None, limit: int | None) -> list[Prompt]:
    """The prompts of a file, `limit` of them evenly spread; without a file, built-in ones. Raises ValueError."""
    from haast.prompts import Prompt, read_prompts

    if path is not None:
        return read_prompts(path, limit, spread=True)
    if limit is not None:
        check_at_least("limit", limit)
    return [Prompt(f"built-in {i}", (text,)) for i, text in enumerate(OWN_PROMPTS[: limit or 4], start=1)]


def load_chosen(
    choice: Choice, loading: Loading, drafting: Drafting, placement: Placement | None = None
) -> tuple[Target, Drafter]:
    """Check all options, then load the target and the chosen drafter. Raises ValueError."""
    from haast.drafters.factory import check_corpus, make_drafter, needs_head, open_head, plan_drafter

    choice.check()
    if not needs_head(choice.drafter):
        drafting = replace(drafting, head="none")
    shape = drafting.check(loading.model, loading.device)
    small = None if choice.small_model is None else replace(loading, model=choice.small_model)
    if small is not None:
        small.check()
    head = None if drafting.head == "none" else drafting.head
    name, folder = plan_drafter(choice.drafter, head, loading.model, small is not None)
    check_corpus(name, choice.corpus)
    target = loading.load(placement)
    drafter = make_drafter(
        name,
        target,
        fitted_head(open_head(folder, loading.model), target),
        shape=shape if drafting.shaped else None,
        window=drafting.draft_window,
        small=None if small is None else small.load(),
        calibration=drafting.calibration,
        corpus=choice.corpus,
    )
    return target, drafter


def encoded_prompts(target: Target, prompts: Sequence[Prompt], raw: bool = False) -> list[BenchPrompt]:
    """Encode the first turn of each prompt. Raises ValueError for one that can't be answered (too long, say)."""
    from haast.api import Haast
    from haast.bench.runner import BenchPrompt
    from haast.drafters.vanilla import VanillaDrafter
    from haast.engine.engine import check_prompts

    encoder = Haast(target, VanillaDrafter())
    encoded = []
    for prompt in prompts:
        tokens = encoder.encode(prompt.turns[0], chat=not raw)
        try:
            check_prompts([tokens], target.context_length, target.vocab_size)
        except ValueError as error:
            raise ValueError(f"prompt {prompt.id!r}: {error}") from error
        encoded.append(BenchPrompt(prompt.id, prompt.category, tuple(tokens)))
    return encoded


def load_all(
    loading: Loading, drafting: Drafting, shape: DraftShape | None, prompts: Sequence[Prompt], raw: bool = False
) -> tuple[Target, EagleDrafter | MedusaDrafter | None, list[BenchPrompt]]:
    """Load the target and the head's drafter (None without a shape or head), and encode the prompts' first turns.

    Raises ValueError.
    """
    target = loading.load()
    drafter = None if shape is None else drafting.load(target, loading.model, shape)
    return target, drafter, encoded_prompts(target, prompts, raw)


def as_eagle(drafter: EagleDrafter | MedusaDrafter | None) -> EagleDrafter | None:
    """The drafter, or None. Raises HeadMismatchError unless it drafts with an EAGLE head."""
    from haast.drafters.eagle import EagleDrafter
    from haast.errors import HeadMismatchError

    if drafter is None or isinstance(drafter, EagleDrafter):
        return drafter
    raise HeadMismatchError("--head has Medusa heads, but must be an EAGLE head (bench: use --medusa-head DIR)")


def load_medusa(folder: Path, target: Target, model: str, nodes: int) -> MedusaDrafter:
    """The drafter of Medusa heads. Raises HeadMismatchError if the folder holds none for this target."""
    from haast.drafters.factory import head_drafter, open_head
    from haast.drafters.medusa import MedusaDrafter
    from haast.drafters.tree_shape import DraftShape
    from haast.errors import HeadMismatchError

    head = fitted_head(open_head(folder, model), target)
    assert head is not None, "the folder is required"
    drafter = head_drafter(target, head, DraftShape(nodes=nodes))
    if not isinstance(drafter, MedusaDrafter):
        raise HeadMismatchError(f"{folder} holds an EAGLE head, not Medusa heads: give it as --head")
    return drafter


def draft_settings(drafter: Drafter | None) -> dict[str, Any]:
    """Shape, pace and window of a head's drafts, for result files; None values without a head."""
    from haast.drafters.eagle import EagleDrafter
    from haast.drafters.hybrid import HybridDrafter
    from haast.drafters.medusa import MedusaDrafter

    drafter = drafter.eagle if isinstance(drafter, HybridDrafter) else drafter
    if not isinstance(drafter, EagleDrafter | MedusaDrafter):
        return {"shape": None, "pace": None, "draft_window": None}
    pace = None if drafter.pace is None else asdict(drafter.pace)
    return {"shape": asdict(drafter.shape), "pace": pace, "draft_window": drafter.window}
