"""From names to drafters: the one place where a target, a head, a shape and what steps cost here are put together.

Where costs are known, drafters that need it get a policy (`haast.tuning.online`): a request whose drafts do not pay
gets smaller ones, then none.

    auto       with an EAGLE head eagle+suffix, with Medusa heads medusa, with a small model small-model, else suffix
    none       vanilla decoding; "vanilla" is another word for it
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path

from haast.core import SamplingParams
from haast.drafters.base import Drafter
from haast.drafters.batch_policy import config_for, default_configs, measured_configs
from haast.drafters.calibrated import apply_calibration, draft_ms, eagle_cost, find_calibration, small_model_cost
from haast.drafters.eagle import EagleDrafter
from haast.drafters.hybrid import HybridDrafter
from haast.drafters.lookahead import LookaheadDrafter
from haast.drafters.medusa import MedusaDrafter
from haast.drafters.ngram import PromptLookupDrafter, SuffixDrafter
from haast.drafters.small_model import SmallModelDrafter
from haast.drafters.tree_shape import DraftShape, shape_for, usual_nodes
from haast.drafters.vanilla import VanillaDrafter
from haast.errors import HeadMismatchError
from haast.formats.files import locate
from haast.formats.opened import OpenedHead, drafter_kind
from haast.formats.opened import open_head as open_files
from haast.heads.checkpoint import Head, head_folder
from haast.heads.medusa import MedusaHeads
from haast.target.load import DEFAULT_MODEL
from haast.target.target import Target
from haast.tuning.latency import Latency, latency_of, measurable, target_identity
from haast.tuning.online import DraftSize, OnlinePolicy

_LOG = logging.getLogger(__name__)

HEADED = ("eagle", "eagle+suffix", "medusa")  # these draft with a head
NAMES = ("auto", *HEADED, "suffix", "lookup", "lookahead", "small-model", "none")
# Window, n-gram and guesses: of ten settings the fastest on validation prompts (results/baselines.json), where more
# nodes cost more than they bring (window 7, n-gram 5, 7 guesses: tau 1.75 instead of 1.33, and far slower).
LOOKAHEAD = (2, 2, 3)
HISTORY_NODES = 6  # of the drafters that read the text alone, where costs are unknown: results/baselines.json
_WEIGHED_NODES = 17  # of theirs, at most, where costs say how many pay
_SMALL_MODEL_CHANCE, _LOOKAHEAD_GAIN = 0.7, 0.3  # of a draft, and drafts kept a step: where nothing is known yet

AnyHead = Head | OpenedHead | EagleDrafter | MedusaDrafter


def check_drafter(name: str, head: str | None = None, small: bool = False) -> str:
    """The drafter that a name means, before anything is loaded: never "auto".

    `head` is the kind of head that there is, "eagle" or "medusa"; `small` is whether there is a small model. Raises
    ValueError for an unknown name, or one that needs a head or model that is not there, HeadMismatchError for a head of
    another kind.
    """
    if name == "auto":
        return {"eagle": "eagle+suffix", "medusa": "medusa", None: "small-model" if small else "suffix"}[head]
    if name == "vanilla":
        return "none"
    if name not in NAMES:
        raise ValueError(f"drafter={name!r} is unknown: choose one of {', '.join(NAMES)}")
    if name == "small-model" and not small:
        raise ValueError("drafter='small-model' needs a smaller model of the same tokenizer: give it too")
    if name in HEADED:
        wanted = "medusa" if name == "medusa" else "eagle"
        if head is None:
            raise ValueError(
                f"drafter={name!r} needs {'Medusa heads' if wanted == 'medusa' else 'an EAGLE head'}: give head (a "
                f"folder), or choose one that needs none: suffix, lookup, lookahead, none"
            )
        if head != wanted:
            raise HeadMismatchError(f"the head holds {head} heads, which do not draft for {name!r}: give {wanted} ones")
    return name


def kind_of(head: AnyHead | None) -> str | None:
    """What kind of head it is, for `check_drafter`."""
    if head is None:
        return None
    if isinstance(head, OpenedHead):
        return head.drafter_kind
    medusa = isinstance(head, MedusaDrafter) or (isinstance(head, Head) and isinstance(head.module, MedusaHeads))
    return "medusa" if medusa else "eagle"


def plan_drafter(name: str, head: str | Path | None, model: str | None, small: bool = False) -> tuple[str, Path | None]:
    """What `make_drafter` will be asked for, before a model is loaded: a drafter, and where its head lies, if any.

    `head` is the user's word, see `find_head`; it is not looked at where the drafter needs none. Raises as
    `check_drafter` and `find_head` do, and HeadMismatchError where the head's config is damaged.
    """
    folder = find_head(head, model) if needs_head(name) else None
    if folder is None:
        return check_drafter(name, None, small), None
    return check_drafter(name, drafter_kind(folder), small), folder


def needs_head(name: str) -> bool:
    """Whether a head would be used, if there is one."""
    return name == "auto" or name in HEADED


def find_head(head: str | Path | None, model: str | None) -> Path | None:
    """Where a head lies by the user's word: a folder or .gguf file; a hub id is fetched, or found in the cache.

    Raises ValueError where "default" names none for this model, HeadMismatchError where nothing is there.
    """
    if head is None:
        return None
    if not isinstance(head, str | Path):
        raise HeadMismatchError(f"head is a {type(head).__name__}: give a folder, a .gguf file or a hub id")
    if head != "default":
        return head_folder(locate(head)[0])
    # By the name itself, or in a path or hub id; a converted GGUF file's folder adds to the model's name.
    if model is None or not Path(model).name.lower().startswith(DEFAULT_MODEL):
        raise ValueError(
            f"no head is shipped for {model or 'a model given as an object'!r}: give its folder, or None to draft "
            f"without one (--head none; only {DEFAULT_MODEL} comes with a head, `haast train --model ...` makes one)"
        )
    return Path(__file__).parents[1] / "data" / "heads" / DEFAULT_MODEL


def open_head(head: str | Path | Head | OpenedHead | None, model: str | None) -> Head | OpenedHead | None:
    """A head by the user's word, see `find_head`, or as it was loaded already; None for none.

    Raises ValueError as `find_head` does, HeadMismatchError where it is no head, or its files are damaged.
    """
    if isinstance(head, Head | OpenedHead):
        return head
    if not isinstance(head, str | Path | None):
        raise HeadMismatchError(f"head is a {type(head).__name__}: give its folder, or what load_head returns")
    folder = find_head(head, model)
    return None if folder is None else open_files(folder)


def make_drafter(
    name: str,
    target: Target,
    head: AnyHead | None = None,
    *,
    shape: DraftShape | None = None,
    window: int | None = None,
    small: Target | None = None,
    calibration: str | Path = "auto",
    sampling: SamplingParams | None = None,
) -> Drafter:
    """Put a drafter together.

    Args:
        name: one of `NAMES`, or "vanilla".
        target: whom it drafts for.
        head: loaded, or in a drafter already, which is then shared; not used by drafters without one.
        shape: of a head's trees, drafted as it is for any number of rows; of Medusa heads its nodes. None: what pays
            here.
        window: positions that an EAGLE head looks back; None is all.
        small, sampling: the model that drafts for "small-model", and how its drafts are drawn; None: the likeliest
            tokens.
        calibration: "auto" goes by what `haast calibrate` found, else by costs that are measured at first use and kept;
            "off" measures nothing and drafts what is usual; else the file of a calibration.

    Raises ValueError as `check_drafter` does, for a window of Medusa heads, and for a calibration of something else;
    HeadMismatchError where the head is another model's, or of another kind.
    """
    chosen = check_drafter(name, kind_of(head), small is not None)
    weighs = calibration != "off"
    source = functools.cache(lambda: latency_of(target)) if weighs and measurable(target) else None
    if chosen in ("suffix", "lookup"):
        nodes = HISTORY_NODES if source is None else _WEIGHED_NODES
        return (SuffixDrafter if chosen == "suffix" else PromptLookupDrafter)(nodes, latency=source)
    if chosen == "lookahead":
        drafter = LookaheadDrafter(target.vocab_size, *LOOKAHEAD)
        full = DraftSize(None, drafter.nodes, 0, 1, drafter.ngram - 1, _LOOKAHEAD_GAIN)
        return _with_policy(drafter, source and source(), (full,))
    if chosen == "small-model":
        assert small is not None, "checked"
        return _small_model(target, small, sampling, weighs)
    if chosen == "none" or head is None:
        return VanillaDrafter()
    drafted = head_drafter(target, head, shape, window)
    if isinstance(drafted, MedusaDrafter):
        return _weighed_medusa(target, drafted) if weighs and shape is None else drafted
    latency = None if shape is not None else tune_eagle(target, drafted, calibration)
    whole = HybridDrafter(drafted, latency=latency) if chosen == "eagle+suffix" else drafted
    beside = whole.undrafted if isinstance(whole, HybridDrafter) else None
    sizes = functools.partial(_eagle_sizes, drafted, whole.nodes - drafted.nodes)
    whole.policy = None if latency is None else OnlinePolicy(latency, sizes, beside, whole.behind)
    return whole


def alternatives(target: Target, drafter: Drafter) -> dict[str, Drafter]:
    """What can draft for a target beside a drafter that does already, and that one, by their names.

    Heads are shared, not loaded again; "none" is always there.
    """
    source = functools.cache(lambda: latency_of(target)) if drafter.policy is not None else None
    found: dict[str, Drafter] = {"none": VanillaDrafter()}
    nodes = HISTORY_NODES if source is None else _WEIGHED_NODES
    for kind in (SuffixDrafter, PromptLookupDrafter):
        found[kind.name] = kind(nodes, latency=source)
    if isinstance(drafter, HybridDrafter):
        eagle = drafter.eagle
        if isinstance(drafter.policy, OnlinePolicy):
            eagle.policy = OnlinePolicy(
                drafter.policy.latency, functools.partial(_eagle_sizes, eagle, 0), behind=eagle.behind
            )
        found[eagle.name] = eagle
    if not isinstance(drafter, VanillaDrafter):
        found[drafter.name] = drafter
    return found


def head_drafter(
    target: Target, head: AnyHead, shape: DraftShape | None = None, window: int | None = None
) -> EagleDrafter | MedusaDrafter:
    """Draft with a head and no policy; Medusa heads take only the shape's nodes: their tree is by their accuracies.

    Raises ValueError for a window of Medusa heads, or below 1, HeadMismatchError for another model's head.
    """
    if isinstance(head, EagleDrafter | MedusaDrafter):
        return head
    shape = shape or shape_for(usual_nodes(target.device.type))
    if isinstance(head, OpenedHead):
        head, _ = head.fitted(target)
    if not isinstance(head.module, MedusaHeads):
        return EagleDrafter(target, head, shape, window)
    if window is not None:
        raise ValueError(f"draft_window={window} is for EAGLE heads; Medusa heads read one position, so leave it out")
    return MedusaDrafter(target, head, shape.nodes)


def tune_eagle(target: Target, drafter: EagleDrafter, calibration: str | Path = "auto") -> Latency | None:
    """Draft what pays here from the next step on; returns what steps cost, None where nothing was measured.

    Raises ValueError as `find_calibration` does.
    """
    kind = target.device.type
    usual = shape_for(usual_nodes(kind))
    drafter.reshape(usual, configs=default_configs(usual, kind))
    if calibration == "off":
        return None
    found, gain = find_calibration(target, drafter, calibration), None
    if found is not None:
        latency: Latency | None = found.latency
        if apply_calibration(drafter, found):
            return latency
        gain = found.expected["tau"] - 1
        _LOG.warning("the calibration found drafting slower than decoding without: little is drafted")
    else:
        known = {"drafter": "eagle", "parameters": drafter.parameters}
        latency = latency_of(target, lambda: eagle_cost(target, drafter), known) if measurable(target) else None
    if latency is not None:
        configs = measured_configs(latency, paced=kind == "cpu", most_gain=gain)
        first = configs[1]
        assert first.shape is not None, "where costs are known, the closed loop says when nothing is drafted"
        drafter.reshape(first.shape, first.pace, configs)
    return latency


def _with_policy(drafter: Drafter, latency: Latency | None, sizes: tuple[DraftSize, ...]) -> Drafter:
    drafter.policy = None if latency is None else OnlinePolicy(latency, lambda rows: sizes)
    return drafter


def _sizes(full: DraftSize, deeper: int = 0) -> tuple[DraftSize, ...]:
    """A small size before the full one, where there is a smaller one; without the levels that others add to a tree."""
    nodes = max(2, int(full.nodes) // 4)
    small = DraftSize(nodes, nodes, min(full.levels, nodes - 1), 1, min(full.depth - deeper, nodes - 1), 0.0)
    return (small, full) if nodes + 1 <= full.nodes else (full,)


def _eagle_sizes(eagle: EagleDrafter, deeper: int, rows: int) -> tuple[DraftSize, ...]:
    """What a head may draft for so many rows; `deeper` are levels that a match may add to its tree."""
    config = config_for(eagle.configs, rows)
    if config.shape is None:
        return ()
    depth, width = config.shape.depth, config.shape.width
    return _sizes(DraftSize(None, config.usual_nodes, depth, width, depth + deeper, config.usual_gain), deeper)


def _weighed_medusa(target: Target, medusa: MedusaDrafter) -> Drafter:
    known = {"drafter": "medusa", "heads": len(medusa.accuracies), "nodes": medusa.nodes}
    latency = latency_of(target, lambda: (draft_ms(target, medusa), {}), known) if measurable(target) else None
    gains = medusa.expected
    gain = gains[min(medusa.nodes - 2, len(gains) - 1)]
    return _with_policy(medusa, latency, _sizes(DraftSize(None, medusa.nodes, 1, 1, medusa.shape.depth, gain)))


def _small_model(target: Target, small: Target, sampling: SamplingParams | None, weighs: bool) -> Drafter:
    drafter = SmallModelDrafter(target, small, sampling=sampling)
    if not (weighs and measurable(target) and measurable(small)):
        return drafter
    own = {f"small {key}": value for key, value in target_identity(small).items()}
    cost = functools.partial(small_model_cost, target, drafter, small)
    latency = latency_of(target, cost, {"drafter": "small-model", "nodes": drafter.nodes, **own})
    depth = drafter.nodes - 1
    gain = sum(_SMALL_MODEL_CHANCE ** (level + 1) for level in range(depth))
    return _with_policy(drafter, latency, _sizes(DraftSize(None, drafter.nodes, depth, 1, depth, gain)))
