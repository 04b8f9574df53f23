"""A training run with the real engine: measures tau, exports the head and writes its model card.

Owns the functions that the trainer is given (`measure_tau`, `export`, `explain`) and the choice of held-out sequences.
"""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor

from haast.api import Haast
from haast.core import SamplingParams
from haast.drafters.block import BlockDrafter
from haast.drafters.factory import head_drafter
from haast.drafters.tree_shape import shape_for
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine, Stats, StopParams, check_prompts
from haast.errors import HeadMismatchError
from haast.files import write_text
from haast.heads import INPUTS
from haast.heads.block import BlockConfig
from haast.heads.checkpoint import AnyModule, Head, check_fits, save_head
from haast.heads.config import HeadSizes
from haast.heads.eagle3 import Eagle3Config, default_layers
from haast.heads.feat_extrapolator import FeatExtrapolatorConfig
from haast.heads.medusa import MedusaConfig, MedusaHeads
from haast.heads.mtp import MtpConfig
from haast.progress import Progress
from haast.stats import TAU_CONVENTION
from haast.target.load import hub_name, load_target
from haast.target.target import Target
from haast.training.batches import Example
from haast.training.checkpoints import check_out
from haast.training.config import TrainConfig, TrainingData
from haast.training.curves import curves, tensorboard
from haast.training.dataset import Report, examples_of, read_inputs, warn_of_foreign_answers, with_shards
from haast.training.diagnostics import diagnose, overfit_self_test
from haast.training.initialise import last_layer_weights, last_layers, unused_context, why_not_last_layer
from haast.training.losses import Loss
from haast.training.objective import rank_accuracies
from haast.training.processes import is_main_process
from haast.training.report import Finding
from haast.training.target_weights import TargetWeights
from haast.training.trainer import Trainer

_LOG = logging.getLogger("haast.training")
_HOLD_OUT_EVERY, _MAX_HELD_OUT = 50, 200
_MARKDOWN: dict[str, Any] = {"trim_blocks": True, "keep_trailing_newline": True, "undefined": StrictUndefined}


class Run:
    """One training run of a head for a target.

    Args:
        target: the model.
        name: its name, for the card.
        settings: of the trainer.
        examples: all sequences; every 50th (200 at most) is held out.
        records: the answer records of the examples, for the counts in the card.
        command: the command line, for the card.
        loss: takes the place of the cross-entropy; None is the cross-entropy.
        initial: the head to start from, whose sizes an MTP head keeps; needed for that kind only.
    """

    def __init__(
        self,
        target: Target,
        name: str,
        settings: TrainConfig,
        examples: Sequence[Example],
        records: Sequence[dict[str, Any]],
        command: str,
        loss: Loss | None = None,
        initial: Head | None = None,
    ) -> None:
        self._loss = loss
        self._head_config = head_config(settings, target, initial)
        self._target, self._name, self._command = target, name, command
        self._records = list(records)
        count = len(examples) if len(examples) >= _HOLD_OUT_EVERY else 0
        held_out = range(0, count, _HOLD_OUT_EVERY)[:_MAX_HELD_OUT]
        self._valid = [examples[i] for i in held_out]
        self._train = [example for i, example in enumerate(examples) if i not in held_out]
        supervised = sum(len(each.queries()) for each in self._train)
        self._settings = settings.for_data(self._head_config.hidden_size, supervised)
        self._prompts: list[list[int]] = []
        self._tau: float | None = None
        self._first_acceptance: list[float] = []  # acceptance rate of the first drafted token
        self._tau_conditions = ""
        self.plan: dict[str, Any] | None = None  # of `make_head`, for the card

    def self_test(self, folder: Path) -> float:
        """Overfit one batch; returns the top-1 agreement. Raises ValueError if it stays low."""
        target_weights, vocab = TargetWeights.of(self._target), self._settings.draft_vocab
        return overfit_self_test(self._head_config, target_weights, self._train, folder, draft_vocab=vocab)

    def train(
        self,
        out: Path,
        prompts: Sequence[str],
        tokens: int,
        nodes: int,
        start_from: Head | None,
        resume: bool,
        console: Console | None = None,
    ) -> dict[str, Any]:
        """Train; writes the best head and its card to `out`/best.

        Args:
            out: folder of the run.
            prompts: texts for measuring tau; empty selects the best head by held-out cross-entropy.
            tokens: new tokens per prompt.
            nodes: tree nodes per step when measuring tau.
            start_from: a head with the initial weights; None uses the settings' `initialisation`.
            resume: resume the run in `out`.
            console: for messages; None is stdout.

        Returns:
            See `Trainer.run`; and `head`, the best head's folder.
        """
        encoder = Haast(self._target, VanillaDrafter())
        self._prompts = [encoder.encode(prompt) for prompt in prompts]
        if prompts:
            check_prompts(self._prompts, self._target.context_length, self._target.vocab_size)
        self._tokens, self._shape = tokens, shape_for(nodes)
        kind = "static" if self._settings.head == "medusa" else "dynamic"
        self._tau_conditions = f"{len(prompts)} prompts, greedy, {tokens} new tokens, {kind} tree of {nodes} nodes"
        weights, vocab = (None, None) if start_from is None else start_parts(start_from, self._head_config)
        if weights is None and not (resume and any(out.glob("state-*.pt"))):
            weights = self._initial_weights()
        trainer = Trainer(
            self._settings,
            self._head_config,
            self._target_weights(),
            self._train,
            self._valid,
            out,
            self.measure_tau if prompts else None,
            self.export,
            weights,
            vocab,
            explain=self.explain,
            watchers={"curves.png": partial(curves, out), "TensorBoard": partial(tensorboard, out)},
            console=console,
            on_cpu=self._target.device.type == "cpu",
            loss=self._loss,
            evaluate_first=start_from is not None,
        )
        self._settings = trainer.config  # with the precision that auto chose, for the card
        return {**trainer.run(resume), "head": str(out / "best")}

    def _target_weights(self) -> TargetWeights:
        found, sizes = TargetWeights.of(self._target), self._head_config
        if not isinstance(sizes, BlockConfig) or self._settings.initialisation == "random":
            return found
        return replace(found, layers=last_layers(self._target, sizes, sizes.num_hidden_layers))

    def _initial_weights(self) -> dict[str, Tensor] | None:
        initialisation, sizes = self._settings.initialisation, self._head_config
        if not isinstance(sizes, FeatExtrapolatorConfig):
            return None
        fits = sizes.inputs == INPUTS[0] and sizes.num_hidden_layers == 1 and not sizes.markov_rank
        unfit = initialisation == "auto" and why_not_last_layer(self._target, sizes)
        if initialisation == "random" or not fits or unfit:
            return None
        with Progress("initial weights"):
            return last_layer_weights(self._target, sizes, self._train)

    def measure_tau(self, head: AnyModule, draft_vocab: Tensor) -> float:
        """Greedy tau of the real engine on the validation prompts."""
        # A copy, since the drafter packs its module in place.
        stored = copy.deepcopy(head).half().float()  # rounded to fp16 as in an exported head
        about = self._accuracies(head, draft_vocab)
        drafter = head_drafter(self._target, Head(stored, draft_vocab, about), self._shape)
        if isinstance(drafter, BlockDrafter):
            drafter.reshape(drafter.suited(self._shape))
        stats = Stats()
        stop = StopParams(self._tokens, Haast(self._target, drafter).eos_ids())
        Engine(self._target, drafter).complete(self._prompts, SamplingParams(), stop, stats)
        self._tau, self._first_acceptance = stats.tau, stats.acceptance_by_depth[:1]
        return stats.tau

    def _accuracies(self, head: AnyModule, draft_vocab: Tensor) -> dict[str, Any]:
        """The accuracies from which a tree for Medusa heads is chosen, on held-out answers if there are any."""
        if not isinstance(head, MedusaHeads):
            return {}
        return {"rank_accuracies": rank_accuracies(head, self._valid or self._train, draft_vocab)}

    def explain(self, values: dict[str, Any], draft_vocab: Tensor) -> list[Finding]:
        """Run the checks for the cause of a tau of about 1."""
        target_weights = TargetWeights.of(self._target)
        return diagnose(self._train, target_weights, draft_vocab, values, self._records, self._prompts, self._name)

    def export(self, folder: Path, head: AnyModule, draft_vocab: Tensor) -> None:
        """Write a head in the format that Haast loads, with its model card. Raises ValueError if a write fails."""
        about = self.about() | self._accuracies(head, draft_vocab)
        weights = {name: tensor.to(torch.float32) for name, tensor in head.state_dict().items()}
        try:
            save_head(folder, head.config, weights, draft_vocab, about)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"cannot write the head to {folder} ({error}): free space and run again with --resume"
            ) from error
        write_text(folder / "README.md", self.card(len(draft_vocab), about))

    def about(self) -> dict[str, Any]:
        """The fields of a head's config that describe its training."""
        sources = Counter((str(r.get("source", "")), str(r.get("licence", ""))) for r in self._records)
        return {
            "target": self._name,
            "command": self._command,
            "views": self._settings.views,
            "settings": asdict(self._settings),
            "plan": self.plan,
            "loss": None if self._loss is None else self._loss.name,
            "sequences": len(self._train),
            "tokens": sum(len(example.tokens) for example in self._train),
            "supervised_tokens": sum(int(example.supervised.sum()) for example in self._train),
            "precision": self._target.precision,
            "trained_length": max(len(example.tokens) for example in self._train),
            "data": [{"source": s, "licence": w, "answers": n} for (s, w), n in sorted(sources.items())],
            "tau": self._tau,
            "expected": {"first": round(self._first_acceptance[0], 4)} if self._first_acceptance else None,
            "tau_measured_on": self._tau_conditions if self._prompts else None,
            "tau_convention": TAU_CONVENTION,
        }

    def card(self, draft_vocab: int, about: dict[str, Any]) -> str:
        """The model card."""
        templates = Environment(loader=PackageLoader("haast", "training/templates"), **_MARKDOWN)
        own = sum("response_ids" in r and r.get("model", self._name) == self._name for r in self._records)
        kinds = {"medusa": "Medusa heads", "mtp": "MTP head", "block": "block head"}
        kind = kinds.get(self._settings.head, "EAGLE head")
        counts = {"draft_vocab": draft_vocab, "own": own, "answers": len(self._records)}
        return templates.get_template("card.md").render(kind=kind, base_model=hub_name(self._name), **counts, **about)


def layer_ids(settings: TrainConfig, target: Target, initial: Head | None = None) -> tuple[int, ...]:
    """The states of the target that a head reads in addition to the feature, or instead of it; often none."""
    if settings.head == "mtp":
        return _mtp_config(initial).layer_ids
    if settings.head == "feat-extrapolator":
        return _context_layers(settings, target, initial)
    return default_layers(target.config) if settings.head in ("eagle3", "block") else ()


def _context_layers(settings: TrainConfig, target: Target, initial: Head | None) -> tuple[int, ...]:
    """The layers that a FeatExtrapolator reads in addition to the feature. Raises ValueError for one out of range."""
    if settings.context_layers is None and initial is not None:
        config = initial.module.config
        return config.layer_ids[:-1] if isinstance(config, FeatExtrapolatorConfig) else ()
    layers = settings.layers_read
    if layers and layers[-1] >= target.layers:
        raise ValueError(f"context_layers={settings.context_layers!r} is not allowed: give 0 to {target.layers - 1}")
    return layers


def _mtp_config(initial: Head | None) -> MtpConfig:
    """The sizes of the MTP head to start from. Raises ValueError if there is none, or it can't be trained."""
    config = None if initial is None else initial.module.config
    if not isinstance(config, MtpConfig):
        raise ValueError(
            "head='mtp' is trained further, from an MTP head: give one to start from (--start-from DIR; `haast import "
            "mtp --out DIR` makes it of the target's own)"
        )
    if config.num_hidden_layers > 1:
        raise ValueError(f"the MTP head has {config.num_hidden_layers} layers: the trainer knows heads of one layer")
    return config


def head_config(settings: TrainConfig, target: Target, initial: Head | None = None) -> HeadSizes:
    """The sizes of the head for these settings and this target; an MTP head has those of `initial`."""
    if settings.head == "mtp":
        config = _mtp_config(initial)
        check_fits(config, target.hidden_size, target.vocab_size, type(target.model).__name__)
        return config
    shared: dict[str, Any] = {"num_hidden_layers": settings.layers, "markov_rank": settings.markov_rank}
    if settings.head == "medusa":
        return MedusaConfig.for_target(target.config, settings.medusa_heads, settings.layers)
    layers = layer_ids(settings, target, initial)
    if settings.head == "block":
        shared = {"num_hidden_layers": settings.block_layers, "markov_rank": settings.block_markov_rank}
        markov = settings.block_markov_rank > 0
        shared |= {"block_size": settings.block_size, "confidence": True, "confidence_markov": markov}
        return BlockConfig.for_target(target.config, layer_ids=layers, **shared)
    if settings.head == "eagle3":
        return Eagle3Config.for_target(target.config, layer_ids=layers, fc_norm=settings.fc_norm, **shared)
    read = (*layers, target.layers) if layers else ()
    return FeatExtrapolatorConfig.for_target(target.config, inputs=settings.inputs, layer_ids=read, **shared)


def start_parts(head: Head, sizes: HeadSizes) -> tuple[dict[str, Tensor], Tensor | None]:
    """A head's weights, and its draft vocabulary if some weights have a row per draft token.

    A FeatExtrapolator may be given layers to read that it did not read before: it starts by not using them.

    Raises:
        HeadMismatchError: it is of another kind than the settings require, or has other options.
    """
    if type(head.module.config) is not type(sizes):
        raise HeadMismatchError(
            f"start_from is a {type(head.module).__name__}, which is another kind than --head: change one of them"
        )
    existing = asdict(head.module.config) | {"draft_vocab_size": None}  # follows from the vocabulary below
    required = asdict(sizes) | {"draft_vocab_size": None}
    weights = dict(head.module.state_dict())
    if isinstance(sizes, FeatExtrapolatorConfig) and sizes.layer_ids and not existing["layer_ids"]:
        existing["layer_ids"] = sizes.layer_ids
        weights |= unused_context(sizes)
    other = {name: (existing[name], required[name]) for name in existing if _differ(existing[name], required[name])}
    if other:
        raise HeadMismatchError(f"start_from is a head with other settings; (its value, required): {other}")
    if isinstance(sizes, MtpConfig):
        uses_vocab = sizes.own_lm_head
    else:
        uses_vocab = not isinstance(sizes, FeatExtrapolatorConfig) or sizes.markov_rank > 0
    draft_vocab = torch.arange(sizes.vocab_size) if head.draft_vocab is None else head.draft_vocab
    return weights, draft_vocab if uses_vocab else None


def _differ(one: Any, other: Any) -> bool:
    """Whether two settings differ; .gguf files hold floats in 32 bits, other checkpoints the same ones in decimals."""
    floats = isinstance(one, float) and isinstance(other, float)
    return not math.isclose(one, other, rel_tol=1e-6) if floats else bool(one != other)


def prepare(
    target: Target,
    name: str,
    data: TrainingData,
    settings: TrainConfig,
    records: Sequence[dict[str, Any]],
    limit: int | None = None,
    initial: Head | None = None,
    command: str = "",
    report: Report = _LOG.info,
    loss: Loss | None = None,
    out: Path | None = None,
) -> Run:
    """Make the examples of a run. `records` are from `dataset.read_inputs`; the other arguments are as for `train`.

    Without `data.shards`, features that would fill the memory are stored in `out`.
    """
    if loss is not None and (settings.lk_after < 1 or settings.rejected_weight != 1):
        raise ValueError(
            f"the loss {loss.name!r} takes the place of the cross-entropy, to which lk_after={settings.lk_after} and "
            f"rejected_weight={settings.rejected_weight} belong: leave both at 1"
        )
    if loss is not None and settings.head == "block":
        raise ValueError(f"head='block' has a loss of its own: leave out the loss {loss.name!r}")
    if initial is not None:  # check it before the features are extracted
        start_parts(initial, head_config(settings, target, initial))
    layers = layer_ids(settings, target, initial)
    data = with_shards(target, name, records, data, layers, out, report)
    examples, sources = examples_of(target, name, records, data, limit, layers, report)
    warn_of_foreign_answers(sources, name, report)
    return Run(target, name, settings, examples, sources, command, loss, initial)


def train(
    target: Target | str,
    data: TrainingData,
    out: str | Path,
    settings: TrainConfig | None = None,
    *,
    limit: int | None = None,
    start_from: Head | None = None,
    resume: bool = False,
    report: Report = _LOG.info,
    loss: Loss | None = None,
) -> dict[str, Any]:
    """Train a head on a target's answers, as `haast train` does.

    Args:
        target: the model, or its name (loaded as `haast.target.load.load_target` does).
        data: answers or shards, and validation prompts.
        out: folder of the run; the best head is written to `out`/best.
        settings: of the trainer; None is the defaults.
        limit: most answers that are used.
        start_from: head whose weights training starts from.
        resume: continue the run in `out`.
        report: called with warnings and counts, one line each.
        loss: a loss of your own, see `haast.training.losses.Loss`; None is the soft cross-entropy of `settings`.

    Returns:
        The trainer's result: `tau` and `ce` of the best head among others, and its folder under `head`.

    Raises:
        ValueError: a setting, the data or `out` cannot be used; the message names the value and the remedy.
    """
    out, settings = Path(out), settings or TrainConfig()
    data.check()
    records, prompts = read_inputs(data, limit)
    on_cpu = isinstance(target, str) or target.device.type == "cpu"
    check_out(out, not resume, is_main_process(data, settings, on_cpu))
    name = target if isinstance(target, str) else str(target.config.name_or_path)
    loaded = load_target(target) if isinstance(target, str) else target
    run = prepare(loaded, name, data, settings, records, limit, start_from, "haast.training.train", report, loss, out)
    return run.train(out, prompts, data.valid_tokens, data.valid_nodes, start_from, resume, Console(stderr=True))
