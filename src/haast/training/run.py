"""One training run joined to the real engine: measured tau, the exported head, and its model card.

Owns what the trainer leaves open: `measure_tau`, `export`, and which sequences are held out.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
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
from haast.drafters.factory import head_drafter
from haast.drafters.tree_shape import shape_for
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine, Stats, StopParams, check_prompts
from haast.errors import HeadMismatchError
from haast.files import write_text
from haast.heads import INPUTS
from haast.heads.checkpoint import AnyModule, Head, save_head
from haast.heads.config import HeadSizes
from haast.heads.eagle3 import Eagle3Config, default_layers
from haast.heads.feat_extrapolator import FeatExtrapolatorConfig
from haast.heads.medusa import MedusaConfig, MedusaHeads
from haast.progress import Progress
from haast.stats import TAU_CONVENTION
from haast.target.load import hub_name
from haast.target.target import Target
from haast.training.batches import Example
from haast.training.config import TrainConfig
from haast.training.curves import curves, tensorboard
from haast.training.diagnostics import diagnose, overfit_self_test
from haast.training.initialise import last_layer_weights, why_not_last_layer
from haast.training.objective import rank_accuracies
from haast.training.report import Finding
from haast.training.target_weights import Frozen
from haast.training.trainer import Trainer

_HOLD_OUT_EVERY, _HELD_OUT_AT_MOST = 50, 200
_MARKDOWN: dict[str, Any] = {"trim_blocks": True, "keep_trailing_newline": True, "undefined": StrictUndefined}


class Run:
    """What one training run knows.

    Args:
        target: the model.
        name: its name, for the card.
        settings: of the trainer.
        examples: all sequences; every 50th (200 at most) is held out.
        records: the answer records behind them, for the card's counts.
        command: the command line, for the card.
    """

    def __init__(
        self,
        target: Target,
        name: str,
        settings: TrainConfig,
        examples: Sequence[Example],
        records: Sequence[dict[str, Any]],
        command: str,
    ) -> None:
        self._head_config = head_config(settings, target)
        self._settings = settings.settled(self._head_config.hidden_size)
        self._target, self._name, self._command = target, name, command
        self._records = list(records)
        several = len(examples) if len(examples) >= _HOLD_OUT_EVERY else 0
        held = range(0, several, _HOLD_OUT_EVERY)[:_HELD_OUT_AT_MOST]
        self._valid = [examples[i] for i in held]
        self._train = [example for i, example in enumerate(examples) if i not in held]
        self._prompts: list[list[int]] = []
        self._tau: float | None = None
        self._first: list[float] = []  # how often the first draft was accepted
        self._measured = ""

    def self_test(self, folder: Path) -> float:
        """Overfit one batch; returns the agreement. Raises ValueError where it stays low."""
        frozen, vocab = Frozen.of(self._target), self._settings.draft_vocab
        return overfit_self_test(self._head_config, frozen, self._train, folder, draft_vocab=vocab)

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
        """Train; the best head lies in `out`/best with its card.

        Args:
            out: folder of the run.
            prompts: texts on which tau is measured; empty selects by held-out cross-entropy.
            tokens: new tokens on each.
            nodes: tree budget there.
            start_from: a head to begin with; None leaves that to the settings' `initialisation`.
            resume: go on with the run in `out`.
            console: where words for people go; None is stdout.
        """
        encoder = Haast(self._target, VanillaDrafter())
        self._prompts = [encoder.encode(prompt) for prompt in prompts]
        if prompts:
            check_prompts(self._prompts, self._target.context_length, self._target.vocab_size)
        self._tokens, self._shape = tokens, shape_for(nodes)
        kind = "static" if self._settings.head == "medusa" else "dynamic"
        self._measured = f"{len(prompts)} prompts, greedy, {tokens} new tokens, {kind} tree of {nodes} nodes"
        weights, vocab = (None, None) if start_from is None else start_parts(start_from, self._head_config)
        if weights is None and not (resume and any(out.glob("state-*.pt"))):
            weights = self._initial_weights()
        trainer = Trainer(
            self._settings,
            self._head_config,
            Frozen.of(self._target),
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
        )
        return trainer.run(resume)

    def _initial_weights(self) -> dict[str, Tensor] | None:
        wanted, sizes = self._settings.initialisation, self._head_config
        if not isinstance(sizes, FeatExtrapolatorConfig):
            return None
        fits = sizes.inputs == INPUTS[0] and sizes.num_hidden_layers == 1 and not sizes.markov_rank
        if wanted == "random" or not fits or (wanted == "auto" and why_not_last_layer(self._target, sizes)):
            return None
        with Progress("the head's start"):
            return last_layer_weights(self._target, sizes, self._train)

    def measure_tau(self, head: AnyModule, draft_vocab: Tensor) -> float:
        """Tau of the real engine on the validation prompts, greedy."""
        # The drafter takes its module over and packs it, so it gets a copy.
        stored = copy.deepcopy(head).half().float()  # as it is exported
        about = self._accuracies(head, draft_vocab)
        drafter = head_drafter(self._target, Head(stored, draft_vocab, about), self._shape)
        stats = Stats()
        stop = StopParams(self._tokens, Haast(self._target, drafter).eos_ids())
        Engine(self._target, drafter).complete(self._prompts, SamplingParams(), stop, stats)
        self._tau, self._first = stats.tau, stats.acceptance_by_depth[:1]
        return stats.tau

    def _accuracies(self, head: AnyModule, draft_vocab: Tensor) -> dict[str, Any]:
        """Of Medusa heads, the accuracies from which their tree is chosen, on held-out answers where there are any."""
        if not isinstance(head, MedusaHeads):
            return {}
        return {"rank_accuracies": rank_accuracies(head, self._valid or self._train, draft_vocab)}

    def explain(self, values: dict[str, Any], draft_vocab: Tensor) -> list[Finding]:
        """What the checks behind an alarm find."""
        frozen = Frozen.of(self._target)
        return diagnose(self._train, frozen, draft_vocab, values, self._records, self._prompts, self._name)

    def export(self, folder: Path, head: AnyModule, draft_vocab: Tensor) -> None:
        """Store a head as users load it, and its model card. Raises ValueError where it cannot be written."""
        about = self.about() | self._accuracies(head, draft_vocab)
        weights = {name: tensor.to(torch.float32) for name, tensor in head.state_dict().items()}
        try:
            save_head(folder, head.config, weights, draft_vocab, about)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"cannot write the head to {folder} ({error}): free space and go on with --resume"
            ) from error
        write_text(folder / "README.md", self.card(len(draft_vocab), about))

    def about(self) -> dict[str, Any]:
        """What a head's config says of its making."""
        sources = Counter((str(r.get("source", "")), str(r.get("licence", ""))) for r in self._records)
        return {
            "target": self._name,
            "command": self._command,
            "views": self._settings.views,
            "settings": asdict(self._settings),
            "sequences": len(self._train),
            "tokens": sum(len(example.tokens) for example in self._train),
            "supervised_tokens": sum(int(example.supervised.sum()) for example in self._train),
            "precision": self._target.precision,
            "trained_length": max(len(example.tokens) for example in self._train),
            "data": [{"source": s, "licence": w, "answers": n} for (s, w), n in sorted(sources.items())],
            "tau": self._tau,
            "expected": {"first": round(self._first[0], 4)} if self._first else None,
            "tau_measured_on": self._measured if self._prompts else None,
            "tau_convention": TAU_CONVENTION,
        }

    def card(self, draft_vocab: int, about: dict[str, Any]) -> str:
        """The model card."""
        templates = Environment(loader=PackageLoader("haast", "training/templates"), **_MARKDOWN)
        own = sum("response_ids" in r and r.get("model", self._name) == self._name for r in self._records)
        kind = "Medusa heads" if self._settings.head == "medusa" else "EAGLE head"
        counts = {"draft_vocab": draft_vocab, "own": own, "answers": len(self._records)}
        return templates.get_template("card.md").render(kind=kind, base_model=hub_name(self._name), **counts, **about)


def layer_ids(settings: TrainConfig, target: Target) -> tuple[int, ...]:
    """The HF `hidden_states` indices that the head of these settings reads; none for a FeatExtrapolator."""
    return default_layers(target.config) if settings.head == "eagle3" else ()


def head_config(settings: TrainConfig, target: Target) -> HeadSizes:
    """The sizes of the head that these settings ask for."""
    shared: dict[str, Any] = {"num_hidden_layers": settings.layers, "markov_rank": settings.markov_rank}
    if settings.head == "medusa":
        return MedusaConfig.for_target(target.config, settings.medusa_heads, settings.layers)
    if settings.head == "eagle3":
        layers = layer_ids(settings, target)
        return Eagle3Config.for_target(target.config, layer_ids=layers, fc_norm=settings.fc_norm, **shared)
    return FeatExtrapolatorConfig.for_target(target.config, inputs=settings.inputs, **shared)


def start_parts(head: Head, wanted: HeadSizes) -> tuple[dict[str, Tensor], Tensor | None]:
    """A head's weights, and its draft vocabulary where weights belong to it.

    Raises:
        HeadMismatchError: it is of another kind than the settings ask for, or has other options.
    """
    if type(head.module.config) is not type(wanted):
        raise HeadMismatchError(
            f"start_from is a {type(head.module).__name__}, which does not fit the settings' --head: change one of both"
        )
    mine = asdict(head.module.config) | {"draft_vocab_size": None}  # follows from the vocabulary below
    asked = asdict(wanted) | {"draft_vocab_size": None}
    other = {name: (mine[name], asked[name]) for name in mine if mine[name] != asked[name]}
    if other:
        raise HeadMismatchError(f"start_from is a head with other settings; (its own, asked for): {other}")
    bound = not isinstance(wanted, FeatExtrapolatorConfig) or wanted.markov_rank > 0
    every = torch.arange(wanted.vocab_size) if head.draft_vocab is None else head.draft_vocab
    return dict(head.module.state_dict()), every if bound else None
