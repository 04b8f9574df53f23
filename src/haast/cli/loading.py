"""Prompts and parts that commands load. Owns the order of checks (files first, then the model), and who speaks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from haast.cli.settings import Choice, Drafting, Loading, check_at_least, fitted

if TYPE_CHECKING:
    from haast.bench.runner import BenchPrompt
    from haast.drafters.base import Drafter
    from haast.drafters.eagle import EagleDrafter
    from haast.drafters.medusa import MedusaDrafter
    from haast.drafters.tree_shape import DraftShape
    from haast.prompts import Prompt
    from haast.target.device_map import Spread
    from haast.target.target import Target

# One a line: what is asked where no prompts are given.
OWN_PROMPTS = tuple((Path(__file__).parents[1] / "data" / "prompts.txt").read_text(encoding="utf-8").splitlines())


@dataclass(frozen=True)
class Spreading:
    """Over what the target is spread."""

    device_map: Annotated[
        str | None, Option(metavar="PLAN", help="auto: over all devices, memory and disk, as transformers plans.")
    ] = None
    tensor_parallel: Annotated[
        bool, Option("--tensor-parallel", help="Under torchrun: cut the layers over its processes.")
    ] = False

    def check(self, loading: Loading) -> Spread:
        """The library's own configuration. Raises ValueError."""
        from haast.target.device_map import Spread

        spread = Spread(self.device_map, tensor_parallel=self.tensor_parallel)
        spread.check(loading.device, loading.packing, loading.compile)
        return spread


def leads(target: Target) -> bool:
    """Whether this process speaks for a target, which several may hold."""
    return target.ranks is None or target.ranks.leads


@contextmanager
def one_voice(target: Target) -> Iterator[None]:
    """Of the processes that hold a target only the first one prints."""
    if leads(target):
        yield
        return
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def read_prompt_file(path: Path | None, limit: int | None) -> list[Prompt]:
    from haast.prompts import Prompt, read_prompts

    if path is not None:
        return read_prompts(path, limit, spread=True)
    if limit is not None:
        check_at_least("limit", limit)
    return [Prompt(f"built-in {i}", (text,)) for i, text in enumerate(OWN_PROMPTS[: limit or 4], start=1)]


def load_chosen(
    choice: Choice, loading: Loading, drafting: Drafting, spread: Spread | None = None
) -> tuple[Target, Drafter]:
    """A target, and the drafter that was asked for; all is checked first. Raises ValueError as loading does."""
    from haast.drafters.factory import make_drafter, needs_head, open_head, plan_drafter

    choice.check()
    if not needs_head(choice.drafter):
        drafting = replace(drafting, head="none")
    shape = drafting.check(loading.model, loading.device)
    small = None if choice.small_model is None else replace(loading, model=choice.small_model)
    if small is not None:
        small.check()
    head = None if drafting.head == "none" else drafting.head
    name, folder = plan_drafter(choice.drafter, head, loading.model, small is not None)
    target = loading.load(spread)
    drafter = make_drafter(
        name,
        target,
        fitted(open_head(folder, loading.model), target),
        shape=shape if drafting.shaped else None,
        window=drafting.draft_window,
        small=None if small is None else small.load(),
        calibration=drafting.calibration,
    )
    return target, drafter


def encoded_prompts(target: Target, prompts: Sequence[Prompt], raw: bool = False) -> list[BenchPrompt]:
    """First turns as tokens. Raises ValueError where one can't be answered."""
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
    """Target, a head's drafter (None without a shape or head) and encoded first turns. Raises ValueError as loading."""
    target = loading.load()
    drafter = None if shape is None else drafting.load(target, loading.model, shape)
    return target, drafter, encoded_prompts(target, prompts, raw)


def as_eagle(drafter: EagleDrafter | MedusaDrafter | None) -> EagleDrafter | None:
    """The drafter where only an EAGLE head will do. Raises HeadMismatchError for another kind's."""
    from haast.drafters.eagle import EagleDrafter
    from haast.errors import HeadMismatchError

    if drafter is None or isinstance(drafter, EagleDrafter):
        return drafter
    raise HeadMismatchError("--head names Medusa heads, and this takes an EAGLE head (bench: --medusa-head DIR)")


def load_medusa(folder: Path, target: Target, model: str, nodes: int) -> MedusaDrafter:
    """The drafter of Medusa heads. Raises HeadMismatchError where the folder holds none for this target."""
    from haast.drafters.factory import head_drafter, open_head
    from haast.drafters.medusa import MedusaDrafter
    from haast.drafters.tree_shape import DraftShape
    from haast.errors import HeadMismatchError

    head = fitted(open_head(folder, model), target)
    assert head is not None, "a folder was given"
    drafter = head_drafter(target, head, DraftShape(nodes=nodes))
    if not isinstance(drafter, MedusaDrafter):
        raise HeadMismatchError(f"{folder} holds an EAGLE head, not Medusa heads: give it as --head")
    return drafter


def drawn_by(drafter: Drafter | None) -> dict[str, Any]:
    """The shape, pace and window of a head's drafts, for a result file; None where there is no head."""
    from haast.drafters.eagle import EagleDrafter
    from haast.drafters.hybrid import HybridDrafter
    from haast.drafters.medusa import MedusaDrafter

    drafter = drafter.eagle if isinstance(drafter, HybridDrafter) else drafter
    if not isinstance(drafter, EagleDrafter | MedusaDrafter):
        return {"shape": None, "pace": None, "draft_window": None}
    pace = None if drafter.pace is None else asdict(drafter.pace)
    return {"shape": asdict(drafter.shape), "pace": pace, "draft_window": drafter.window}
