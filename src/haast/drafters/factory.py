"""Creates drafters by name, from a target, a head, a shape and measured costs.

If costs are known, drafters that need it get a policy (`haast.tuning.online`): a request whose drafts do not pay gets
smaller ones, then none.

    auto       with an EAGLE head eagle+suffix, with a block head block+suffix, with Medusa heads medusa, with a small
               model small-model, else suffix
    none       vanilla decoding; "vanilla" is an alias
"""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from pathlib import Path

from haast.core import SamplingParams
from haast.drafters.base import Drafter
from haast.drafters.batch_policy import config_for, default_configs, measured_configs
from haast.drafters.block import BlockDrafter
from haast.drafters.calibrated import apply_calibration, draft_ms, eagle_cost, find_calibration, small_model_cost
from haast.drafters.corpus import Corpus
from haast.drafters.eagle import EagleDrafter
from haast.drafters.hybrid import MATCH_DEPTH, HybridDrafter
from haast.drafters.lookahead import LookaheadDrafter
from haast.drafters.medusa import MedusaDrafter
from haast.drafters.ngram import PromptLookupDrafter, SuffixDrafter
from haast.drafters.small_model import SmallModelDrafter
from haast.drafters.tree_shape import DraftShape, default_nodes, shape_for
from haast.drafters.vanilla import VanillaDrafter
from haast.errors import HeadMismatchError, expanded
from haast.files import check_writable
from haast.formats.files import locate
from haast.formats.mtp import MTP, mtp_folder
from haast.formats.opened import OpenedHead, drafter_kind
from haast.formats.opened import open_head as open_files
from haast.heads.block import BlockHead
from haast.heads.checkpoint import Head, head_folder
from haast.heads.medusa import MedusaHeads
from haast.target.load import DEFAULT_MODEL
from haast.target.target import Target
from haast.tuning.latency import Latency, latency_of, measurable, target_identity
from haast.tuning.online import DraftSize, OnlinePolicy

_LOG = logging.getLogger(__name__)

HEADED = ("eagle", "eagle+suffix", "block", "block+suffix", "medusa")  # drafters with a head
COPYING = ("eagle+suffix", "block+suffix", "suffix")  # drafters that may copy from a corpus
_HEADS = {"eagle": "an EAGLE head", "block": "a block head", "medusa": "Medusa heads"}
NAMES = ("auto", *HEADED, "suffix", "lookup", "lookahead", "small-model", "none")
# Window, n-gram and guesses: the fastest of ten settings on validation prompts (results/baselines.json). More nodes
# cost more than they gain there (window 7, n-gram 5, 7 guesses: tau 1.75 instead of 1.33, and far slower).
LOOKAHEAD = (2, 2, 3)
HISTORY_NODES = 6  # tree size of suffix and lookup drafters without measured costs: results/baselines.json
_MAX_HISTORY_NODES = 17  # maximum with measured costs, which decide how many pay
_SMALL_MODEL_RATE, _LOOKAHEAD_GAIN = 0.7, 0.3  # initial guesses: acceptance rate; accepted drafts per step

AnyHead = Head | OpenedHead | EagleDrafter | MedusaDrafter


def check_drafter(name: str, head: str | None = None, small: bool = False) -> str:
    """Resolve a drafter name ("auto", "vanilla") before anything is loaded.

    `head` is the kind of the head, "eagle", "block", "medusa" or None; `small` is whether there is a small model.
    Raises ValueError for an unknown name or a missing head or model, HeadMismatchError for a head of another kind.
    """
    if name == "auto":
        headed = {"eagle": "eagle+suffix", "block": "block+suffix", "medusa": "medusa"}
        return headed[head] if head is not None else "small-model" if small else "suffix"
    if name == "vanilla":
        return "none"
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"drafter={name!r} is unknown: choose one of {', '.join(NAMES)}")
    if name == "small-model" and not small:
        raise ValueError("drafter='small-model' needs a smaller model with the same tokenizer: give one")
    if name in HEADED:
        wanted = name.removesuffix("+suffix")
        if head is None:
            raise ValueError(
                f"drafter={name!r} needs {_HEADS[wanted]}: give head (a folder), or choose one that needs none: "
                f"suffix, lookup, lookahead, none"
            )
        if head != wanted:
            raise HeadMismatchError(f"the head holds {head} heads, which do not draft for {name!r}: give {wanted} ones")
    return name


def check_corpus(name: str, corpus: str | Path | None) -> None:
    """Raise ValueError for a corpus with a drafter that does not copy, or one whose file can't be written."""
    if corpus is None:
        return
    if name not in COPYING:
        raise ValueError(f"a corpus is for drafters that copy from texts ({', '.join(COPYING)}), not for {name!r}")
    check_writable(str(corpus))


def kind_of(head: AnyHead | None) -> str | None:
    """The kind of a head for `check_drafter`: "eagle", "block", "medusa" or None."""
    if head is None:
        return None
    if isinstance(head, OpenedHead):
        return head.drafter_kind
    module = head.module if isinstance(head, Head) else None
    if isinstance(head, MedusaDrafter) or isinstance(module, MedusaHeads):
        return "medusa"
    return "block" if isinstance(head, BlockDrafter) or isinstance(module, BlockHead) else "eagle"


def plan_drafter(name: str, head: str | Path | None, model: str | None, small: bool = False) -> tuple[str, Path | None]:
    """Resolve a drafter name and a head before a model is loaded: the name for `make_drafter`, and the head's path.

    `head` is the user's argument, see `find_head`; it is ignored if the drafter uses no head. Raises like
    `check_drafter` and `find_head`, and HeadMismatchError if the head's config is damaged.
    """
    folder = find_head(head, model) if needs_head(name) else None
    if folder is None:
        return check_drafter(name, None, small), None
    return check_drafter(name, drafter_kind(folder), small), folder


def needs_head(name: str) -> bool:
    """Whether a drafter of this name uses a head if there is one."""
    return name == "auto" or name in HEADED


def find_head(head: str | Path | None, model: str | None) -> Path | None:
    """The path of a head, by a folder, a .gguf file, a hub id (downloaded, or found in the cache), "default" or "mtp".

    "mtp" is the MTP head in the model's own checkpoint. Raises ValueError if there is no default head for this model,
    HeadMismatchError if no head is found.
    """
    if head is None:
        return None
    if not isinstance(head, str | Path):
        raise HeadMismatchError(f"head is a {type(head).__name__}: give a folder, a .gguf file or a hub id")
    if head == MTP:
        return mtp_folder(model)
    if head != "default":
        return head_folder(locate(head)[0])
    # The model may be a name, a path or a hub id; a GGUF file's name has more behind the model's.
    if model is None or not Path(model).name.lower().startswith(DEFAULT_MODEL):
        raise ValueError(
            f"no head is shipped for {model or 'a model given as an object'!r}: give its folder, or None to draft "
            f"without one (--head none; only {DEFAULT_MODEL} comes with a head, `haast train --model ...` trains one, "
            f"--head {MTP} takes the one in the model's own checkpoint)"
        )
    return Path(__file__).parents[1] / "data" / "heads" / DEFAULT_MODEL


def open_head(head: str | Path | Head | OpenedHead | None, model: str | None) -> Head | OpenedHead | None:
    """Load a head by path or name, see `find_head`; a loaded head and None are returned unchanged.

    Raises ValueError like `find_head`, HeadMismatchError if it is not a head or its files are damaged.
    """
    if isinstance(head, Head | OpenedHead):
        return head
    if not isinstance(head, str | Path | None):
        raise HeadMismatchError(f"head is a {type(head).__name__}: give its folder, or the result of load_head")
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
    corpus: str | Path | None = None,
) -> Drafter:
    """Create a drafter.

    Args:
        name: one of `NAMES`, or "vanilla".
        target: the model that it drafts for.
        head: a loaded head, or a drafter whose head is shared; ignored by drafters without a head.
        shape: tree shape, used for all batch sizes; Medusa heads use only its nodes. None: chosen by cost.
        window: attention window of an EAGLE head in positions; None is all.
        small, sampling: the draft model of "small-model", and how its drafts are sampled; None: argmax.
        calibration: "auto" uses the result of `haast calibrate`, otherwise costs that are measured at first use and
            saved; "off" measures nothing and uses defaults; otherwise the path of a calibration.
        corpus: file of earlier answers for the drafters of `COPYING`, see `haast.drafters.corpus`.

    Raises ValueError like `check_drafter` and `check_corpus`, for a window with Medusa heads, for a calibration of
    another setting, and for a corpus of another model or in use;
    HeadMismatchError for a head of another model or kind.
    """
    chosen = check_drafter(name, kind_of(head), small is not None)
    check_corpus(chosen, corpus)
    opened = None if corpus is None else Corpus(expanded(corpus, "no corpus at"), target.vocab_size)
    use_costs = calibration != "off"
    source = functools.cache(lambda: latency_of(target)) if use_costs and measurable(target) else None
    if chosen in ("suffix", "lookup"):
        nodes = HISTORY_NODES if source is None else _MAX_HISTORY_NODES
        if chosen == "lookup":
            return PromptLookupDrafter(nodes, latency=source)
        return SuffixDrafter(nodes, latency=source, corpus=opened)
    if chosen == "lookahead":
        lookahead = LookaheadDrafter(target.vocab_size, *LOOKAHEAD)
        full = DraftSize(None, lookahead.nodes, 0, 1, lookahead.ngram - 1, _LOOKAHEAD_GAIN)
        return _with_policy(lookahead, source and source(), (full,))
    if chosen == "small-model":
        assert small is not None, "check_drafter raises without a small model"
        return _small_model(target, small, sampling, use_costs)
    if chosen == "none":
        return VanillaDrafter()
    assert chosen in HEADED and head is not None, f"{chosen!r} is in NAMES: give it a branch here"
    headed = head_drafter(target, head, shape, window)
    if isinstance(headed, MedusaDrafter):
        return _medusa_with_policy(target, headed) if use_costs and shape is None else headed
    latency = None if shape is not None else tune_eagle(target, headed, calibration)
    drafter = HybridDrafter(headed, opened, latency=latency) if chosen.endswith("+suffix") else headed
    baseline = drafter.suffix_only if isinstance(drafter, HybridDrafter) else None
    sizes = functools.partial(_eagle_sizes, headed, 0 if drafter is headed else MATCH_DEPTH)
    drafter.policy = None if latency is None else OnlinePolicy(latency, sizes, baseline, drafter.pending_positions)
    return drafter


def alternatives(target: Target, drafter: Drafter) -> dict[str, Drafter]:
    """All drafters that can be used with a target without loading more, the given one included, by name.

    They share the drafter's head; "none" is always included.
    """
    source = functools.cache(lambda: latency_of(target)) if drafter.policy is not None else None
    drafters: dict[str, Drafter] = {"none": VanillaDrafter()}
    nodes = HISTORY_NODES if source is None else _MAX_HISTORY_NODES
    for kind in (SuffixDrafter, PromptLookupDrafter):
        drafters[kind.name] = kind(nodes, latency=source)
    if isinstance(drafter, HybridDrafter):
        eagle = drafter.eagle
        if isinstance(drafter.policy, OnlinePolicy):
            sizes = functools.partial(_eagle_sizes, eagle, 0)
            eagle.policy = OnlinePolicy(drafter.policy.latency, sizes, pending=eagle.pending_positions)
        drafters[eagle.name] = eagle
    if not isinstance(drafter, VanillaDrafter):
        drafters[drafter.name] = drafter
    return drafters


def head_drafter(
    target: Target, head: AnyHead, shape: DraftShape | None = None, window: int | None = None
) -> EagleDrafter | MedusaDrafter:
    """A drafter with a head and no policy. Medusa heads use only the shape's nodes: their accuracies give the tree.

    Raises ValueError for a window with Medusa heads or below 1, HeadMismatchError for another model's head.
    """
    if isinstance(head, EagleDrafter | MedusaDrafter):
        return head
    chosen = shape or shape_for(default_nodes(target.device.type))
    if isinstance(head, OpenedHead):
        head, _ = head.fitted(target)
    if not isinstance(head.module, MedusaHeads):
        drafter = (BlockDrafter if isinstance(head.module, BlockHead) else EagleDrafter)(target, head, chosen, window)
        if shape is None:
            drafter.reshape(drafter.suited(chosen))
        return drafter
    if window is not None:
        raise ValueError(f"draft_window={window} is for EAGLE heads; Medusa heads read one position: leave it out")
    return MedusaDrafter(target, head, chosen.nodes)


def tune_eagle(target: Target, drafter: EagleDrafter, calibration: str | Path = "auto") -> Latency | None:
    """Set the shapes that pay on this machine, from the next step on; returns the costs, None if none were measured.

    Raises ValueError like `find_calibration`.
    """
    kind = target.device.type
    default = drafter.suited(shape_for(default_nodes(kind)))
    drafter.reshape(default, configs=default_configs(default, kind))
    if calibration == "off":
        return None
    found, gain = find_calibration(target, drafter, calibration), None
    if found is not None:
        latency: Latency | None = found.latency
        if apply_calibration(drafter, found):
            return latency
        gain = found.expected["tau"] - 1
        _LOG.warning("the calibration found drafting slower than vanilla decoding: few tokens will be drafted")
    else:
        identity = {"drafter": drafter.name, "parameters": drafter.parameters}
        latency = latency_of(target, lambda: eagle_cost(target, drafter), identity) if measurable(target) else None
    if latency is not None:
        configs = {
            rows: config if config.shape is None else replace(config, shape=drafter.suited(config.shape))
            for rows, config in measured_configs(latency, paced=kind == "cpu", most_gain=gain).items()
        }
        first = configs[1]
        assert first.shape is not None, "measured configs have a shape: the online policy decides when to draft nothing"
        drafter.reshape(first.shape, first.pace, configs)
    return latency


def draft_always(target: Target, drafter: Drafter) -> None:
    """Let a drafter with a policy draft trees of the default size in every step from the next one on, pay or not."""
    drafter.policy = None
    headed = drafter.eagle if isinstance(drafter, HybridDrafter) else drafter
    if isinstance(headed, EagleDrafter):
        tune_eagle(target, headed, "off")


def _with_policy(drafter: Drafter, latency: Latency | None, sizes: tuple[DraftSize, ...]) -> Drafter:
    drafter.policy = None if latency is None else OnlinePolicy(latency, lambda rows: sizes)
    return drafter


def _sizes(full: DraftSize, deeper: int = 0) -> tuple[DraftSize, ...]:
    """A small draft size, if it is smaller, and the full one. `deeper` levels of the full tree come from matches."""
    nodes = max(2, int(full.nodes) // 4)
    small = DraftSize(nodes, nodes, min(full.levels, nodes - 1), 1, min(full.depth - deeper, nodes - 1), 0.0)
    return (small, full) if nodes + 1 <= full.nodes else (full,)


def _eagle_sizes(eagle: EagleDrafter, deeper: int, rows: int) -> tuple[DraftSize, ...]:
    """The draft sizes of a head for a batch size; `deeper` is the number of levels that a match may add to its tree."""
    config = config_for(eagle.configs, rows)
    if config.shape is None:
        return ()
    depth, width = config.shape.depth, config.shape.width
    return _sizes(DraftSize(None, config.mean_nodes, depth, width, depth + deeper, config.expected_gain), deeper)


def _medusa_with_policy(target: Target, medusa: MedusaDrafter) -> Drafter:
    identity = {"drafter": "medusa", "heads": len(medusa.accuracies), "nodes": medusa.nodes}
    latency = latency_of(target, lambda: (draft_ms(target, medusa), {}), identity) if measurable(target) else None
    gains = medusa.expected
    gain = gains[min(medusa.nodes - 2, len(gains) - 1)]
    return _with_policy(medusa, latency, _sizes(DraftSize(None, medusa.nodes, 1, 1, medusa.shape.depth, gain)))


def _small_model(target: Target, small: Target, sampling: SamplingParams | None, use_costs: bool) -> Drafter:
    drafter = SmallModelDrafter(target, small, sampling=sampling)
    if not (use_costs and measurable(target) and measurable(small)):
        return drafter
    identity = {f"small {key}": value for key, value in target_identity(small).items()}
    cost = functools.partial(small_model_cost, target, drafter, small)
    latency = latency_of(target, cost, {"drafter": "small-model", "nodes": drafter.nodes, **identity})
    depth = drafter.nodes - 1
    gain = sum(_SMALL_MODEL_RATE ** (level + 1) for level in range(depth))
    return _with_policy(drafter, latency, _sizes(DraftSize(None, drafter.nodes, depth, 1, depth, gain)))
