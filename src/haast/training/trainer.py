"""The training loop of a head (EAGLE, arXiv 2401.15077, section 3.2; EAGLE-3, arXiv 2503.01840, section 3.2).

Owns steps, schedule, checkpoints, metrics and the choice of the best head by measured tau. Knows neither the engine (it
is handed `measure_tau`) nor how a head is stored for users. A run is a pure function of its configuration and data: a
resumed run repeats the loss curve bit for bit on the same CPU and thread count, and a step of n processes is a step of
one process that accumulates n times as many batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from haast.heads.checkpoint import AnyModule
from haast.heads.config import HeadSizes
from haast.interrupt import interrupt_flag
from haast.training import checkpoints
from haast.training.batches import BatchOrder, Example, PackedBatch, digest, pack, usable
from haast.training.config import TrainConfig
from haast.training.objective import ALPHAS, Objective
from haast.training.optimizer import HeadOptimizer, matmul_precision
from haast.training.processes import Processes
from haast.training.report import Finding, Reporter, Watcher
from haast.training.scaled_head import make_head
from haast.training.target_weights import Frozen, check_sizes, choose_draft_vocab

MeasureTau = Callable[[AnyModule, Tensor], float]  # (head in eval mode, draft vocabulary ids) -> tau
Explain = Callable[[dict[str, Any], Tensor], list[Finding]]  # (an evaluation, draft vocabulary ids) -> what is wrong
_FORMAT = 2  # of checkpoints: their tensors' names
_TAU_IS_ONE = 1.05  # a head below this drafts nothing that is accepted
_EARLY = 0.2  # share of the run before which a tau of one is no alarm
_MARKS = (1.5, 2.0, 2.4, 2.8, 3.2, 3.6)  # taus whose time is told


@dataclass
class _Progress:
    """Where a run is. Everything here goes into a checkpoint."""

    step: int = 0
    views: int = 0
    epoch: int = 0
    place: int = 0
    logged: int = 0  # views at the last log line, and so on
    evaluated: int = 0
    saved: int = 0
    tau: float = 0.0
    best: float = 0.0  # the best evaluation's score: its tau where one is measured
    worse: int = 0  # evaluations since then
    ended: bool = False  # by patience or until_tau
    seconds: float = 0.0  # spent in the loop, evaluations included


class Trainer:
    """Trains one head.

    Args:
        config: settings.
        head_config: sizes of the head; an Eagle3Config's `draft_vocab_size` is set here.
        frozen: the target's ends.
        train: sequences to learn from.
        valid: held-out sequences for cross-entropy and top-1 agreement.
        out_dir: checkpoints, `metrics.jsonl`, `best/`.
        measure_tau: the real engine on validation prompts; None leaves selection to the validation cross-entropy.
        export: how a head is stored, (folder, head, draft vocabulary) -> None; None stores a bare `head.pt`.
        start_from: plain weights of a head to start from (see `initialise`); None is noise.
        draft_vocab: target ids to draft over; None takes the likeliest `config.draft_vocab`.
        quiet: no terminal output.
        explain: looks for the causes of a tau of about 1; None raises the alarm alone.
        watchers: follow the metrics, see `report.Watcher`.
        on_cpu: train there even where accelerate would find something faster.
        console: where words for people go; None is stdout.

    Raises:
        ValueError: nothing to train on, sizes that do not fit, or a folder that cannot be written.
    """

    def __init__(
        self,
        config: TrainConfig,
        head_config: HeadSizes,
        frozen: Frozen,
        train: Sequence[Example],
        valid: Sequence[Example],
        out_dir: Path,
        measure_tau: MeasureTau | None = None,
        export: Callable[[Path, AnyModule, Tensor], None] | None = None,
        start_from: dict[str, Tensor] | None = None,
        draft_vocab: Tensor | None = None,
        quiet: bool = False,
        explain: Explain | None = None,
        watchers: Mapping[str, Watcher] | None = None,
        on_cpu: bool = False,
        console: Console | None = None,
    ) -> None:
        config = config.settled(head_config.hidden_size)  # so that a checkpoint holds the number
        self.config, self.out_dir = config, out_dir
        self.train_set, self.valid_set = usable(train), usable(valid)
        self._order = BatchOrder([e.pairs for e in self.train_set], config.positions, config.seed)
        check_sizes(head_config, frozen, self.train_set[0])
        self._data = digest([*self.train_set, *self.valid_set])
        self._processes = Processes(config.mixed_precision, config.shard, on_cpu)
        if self._processes.main:
            checkpoints.write_probe(out_dir)
        self._measure_tau, self._export, self._explain = measure_tau, export, explain
        stored = self.train_set[0].topk_ids.shape[1]
        if config.teacher_top > stored:
            raise ValueError(f"teacher_top={config.teacher_top} is more than the {stored} tokens that are stored")
        self._resumable = checkpoints.load_newest(out_dir)
        if self._resumable is not None:  # ids that a head's rows belong to, wherever they came from
            draft_vocab = self._resumable.get("draft_vocab", draft_vocab)
        if draft_vocab is None:
            draft_vocab = choose_draft_vocab(self.train_set, len(frozen.head), config.draft_vocab, frozen.eos_ids)
        self.draft_vocab = draft_vocab
        self.head = make_head(config, head_config, frozen, self.train_set, draft_vocab)
        self.head_config = self.head.config
        if start_from is not None:
            self.head.load_plain(start_from)
        self._captured = self.head.reads_captured
        self._objective = self._processes.prepare(
            Objective(self.head, frozen, draft_vocab, config, self._processes.device)
        )
        trained = [(name, p) for name, p in self._objective.named_parameters() if p.requires_grad]
        self._averages = [p.detach().clone() for _, p in trained] if config.ema else []
        self._optimizer = HeadOptimizer(trained, config)
        self._at = _Progress()
        main = self._processes.main
        self._report = Reporter(
            config.views, out_dir / "metrics.jsonl", quiet or not main, watchers if main else None, main, console
        )

    def run(self, resume: bool = False) -> dict[str, Any]:
        """Train to the end (or Ctrl-C, which saves first).

        Returns:
            The last evaluation, all of them as `metrics`, and the seconds to each tau.

        Raises:
            KeyboardInterrupt: after the checkpoint was written.
            ValueError: there is a run in the folder and `resume` is false, or its settings differ.
        """
        with closing(self._report):
            self._open(resume)
            return self._train()

    def _train(self) -> dict[str, Any]:
        result: dict[str, Any] = {}
        stopped, products = False, matmul_precision(self.config.matmul_precision)
        with self._report.live(self._at.views), interrupt_flag() as interrupted, products:
            batches, begun = self._order.batches(self._at.epoch, self._at.place), time.monotonic()
            before = self._at.seconds
            while self._at.views < self.config.views and not self._at.ended:
                stopped = self._processes.any(interrupted.is_set())
                if stopped:
                    break
                self._advance(batches)
                self._at.seconds = before + time.monotonic() - begun
                result = self._periodic() or result
        if stopped:
            self.save()
            raise KeyboardInterrupt
        self.save()  # first: a resumed run writes the last lines again, and a failing evaluation costs no training
        if not (self._at.ended and result):
            self._report.line(self._at.step)
            with self._report.evaluating():
                result = self.evaluate()
        evaluations = [line for line in self._report.lines() if "seconds" in line]
        marks = dict[str, float]()  # the seconds until an evaluation first measured each of some taus
        for line, mark in product(evaluations, _MARKS):
            if line.get("tau", 0.0) >= mark:
                marks.setdefault(str(mark), line["seconds"])
        return result | {"seconds": self._at.seconds, "seconds_to_tau": marks, "metrics": evaluations}

    def _advance(self, batches: Iterator[tuple[int, int, list[int]]]) -> None:
        """One step: every process takes its share of the next batches."""
        share = self.config.accumulate
        taken = [next(batches) for _ in range(share * self._processes.count)]
        first = share * self._processes.index
        mine = [pack([self.train_set[i] for i in indices], self._captured) for _, _, indices in taken[first:][:share]]
        sums = self._step(mine)
        self._at.step, (self._at.epoch, self._at.place, _) = self._at.step + 1, taken[-1]
        self._at.views += int(sums["views"])
        self._report.step(self._at.views, sums, self._at.tau)

    def _periodic(self) -> dict[str, Any] | None:
        at, config, result = self._at, self.config, None
        if at.views - at.logged >= config.log_every:
            self._report.line(at.step)
            at.logged = at.views
        if at.views - at.evaluated >= config.evaluate_every and at.views < config.views:
            at.evaluated = at.views
            result = self.evaluate()
        if at.views - at.saved >= config.checkpoint_every:
            at.saved = at.views
            self.save()
        return result

    def _step(self, batches: Sequence[PackedBatch]) -> dict[str, float]:
        """Gradients of all batches of all processes, one step of the optimiser; returns sums over their views."""
        config, totals = self.config, dict[str, Tensor]()
        for number, batch in enumerate(batches):
            noise = self._noise(batch, self._processes.index * len(batches) + number)
            batch = batch.to(self._processes.device)
            sharpness = config.sharpness_at(self._at.views)
            with self._processes.autocast():
                loss, sums = self._objective(batch, noise, sharpness, config.passes_at(self._at.views))
            self._processes.backward(self._objective, loss, meet=number == len(batches) - 1)
            for name in ("views", "loss", "ce", "feature", "top1", "accepted"):
                totals[name] = totals.get(name, torch.zeros(())) + sums.get(name, torch.zeros(())).cpu()
        reached = self._processes.sums(totals)
        for parameter in self._objective.parameters():
            if parameter.grad is not None:
                parameter.grad /= reached["views"]
        norm = self._processes.clip(self._objective, config.clip)
        if not norm < float("inf"):
            raise ValueError(
                f"the gradient is not finite at step {self._at.step}: start again in another folder with a lower "
                f"learning_rate, or from {self.out_dir / 'best'}"
            )
        self._optimizer.step(config.learning_rate_at(self._at.views))
        if self._averages:
            decay = min(config.ema, (1 + self._at.step) / (10 + self._at.step))
            trained = [p.detach() for p in self._objective.parameters() if p.requires_grad]
            get_ema_multi_avg_fn(decay)(self._averages, trained, 0)  # type: ignore[no-untyped-call]
        return reached

    def _noise(self, batch: PackedBatch, number: int) -> Tensor | None:
        """Uniform noise, a function of seed, step and place in the step alone."""
        width = self.config.feature_noise
        if not width:
            return None
        keyed = torch.Generator().manual_seed((self.config.seed * 1_000_003 + self._at.step) * 1024 + number)
        noise = (torch.rand(batch.features.shape, generator=keyed) - 0.5) * width
        return noise.to(self._processes.device)

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Held-out cross-entropy, agreement by depth and tau, with the averaged weights; keeps the best head."""
        values: dict[str, Any] = {}
        with self._report.paused(), self._averaged():
            if self.valid_set:
                values = self._held_out()
            weights = self._processes.weights(self._objective)  # a meeting of all processes
            head = self._plain(weights) if self._processes.main else None
            if self._measure_tau is not None:
                own = 0.0 if head is None else float(self._measure_tau(head, self.draft_vocab))
                values["tau"] = self._at.tau = self._processes.agree(own)
            score = self._processes.agree(values.get("tau", 1 / (1 + values.get("valid_ce", 1.0))))
            self._at.worse = 0 if score >= self._at.best else self._at.worse + 1
            if score >= self._at.best:
                self._at.best = score
                if head is not None:
                    self._store(self.out_dir / "best", head)
        patience, wanted = self.config.patience, self.config.until_tau
        self._at.ended = bool(patience and self._at.worse >= patience) or bool(wanted and self._at.tau >= wanted)
        early = self._at.views < _EARLY * self.config.views
        alarm = "tau" in values and values["tau"] < _TAU_IS_ONE and not early and self._processes.main
        told = values | {"seconds": round(self._at.seconds, 1)}
        findings = (self._explain(values, self.draft_vocab) if self._explain else []) if alarm else None
        self._report.evaluation(self._at.step, self._at.views, told, findings)
        return values

    def _held_out(self) -> dict[str, Any]:
        """Means over held-out views; `valid_alpha[n]`: agreement when n of the states read are the head's own."""
        order, sums = BatchOrder([e.pairs for e in self.valid_set], self.config.positions, 0), dict[str, float]()
        for indices in order.epoch(0):
            batch = pack([self.valid_set[i] for i in indices], self._captured).to(self._processes.device)
            for name, value in self._objective(batch, passes=ALPHAS)[1].items():
                sums[name] = sums.get(name, 0.0) + float(value)
        kinds = ("ce", "feature", "top1", "accepted") if self.head.regresses else ("ce", "top1", "accepted")
        values: dict[str, Any] = {f"valid_{name}": sums[name] / sums["views"] for name in kinds}
        depths = [i for i in range(ALPHAS) if sums.get(f"tried_{i}")]
        return values | {"valid_alpha": [round(sums[f"right_{i}"] / sums[f"tried_{i}"], 4) for i in depths]}

    def plain_head(self) -> AnyModule:
        """The present weights as users get them, in eval mode (on the main process)."""
        with self._averaged():
            return self._plain(self._processes.weights(self._objective))

    def _plain(self, weights: dict[str, Tensor]) -> AnyModule:
        return self.head.plain({name.removeprefix("head."): tensor for name, tensor in weights.items()})

    def _store(self, folder: Path, head: AnyModule) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if self._export is not None:
            self._export(folder, head, self.draft_vocab)
        else:
            checkpoints.atomic_save({"weights": head.state_dict(), "draft_vocab": self.draft_vocab}, folder / "head.pt")

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        parameters = [p for p in self._objective.parameters() if p.requires_grad]
        own = [p.data for p in parameters]
        for parameter, average in zip(parameters, self._averages, strict=bool(self._averages)):
            parameter.data = average
        try:
            yield
        finally:
            for parameter, data in zip(parameters, own, strict=True):
                parameter.data = data

    def save(self) -> None:
        """Write a checkpoint."""
        state: dict[str, Any] = {
            "format": _FORMAT,
            "config": asdict(self.config),
            "head": asdict(self.head_config),
            "data": self._data,
            "draft_vocab": self.draft_vocab,
            "processes": self._processes.count,
            "weights": self._processes.weights(self._objective),
            "averages": self._averages,
            "optimizer": self._processes.optimizer_state(self._objective, self._optimizer.parts),
            "progress": asdict(self._at),
            "report": self._report.state(),
        }
        if self._processes.main:
            checkpoints.save_state(self.out_dir, state, self._at.step)
        self._processes.wait()

    def _open(self, resume: bool) -> None:
        state = self._resumable
        if state is None:
            self._report.start(0)
            return
        if not resume:
            raise ValueError(f"{self.out_dir} holds a training run: resume it, or choose another folder")
        own = asdict(self.config) | asdict(self.head_config)
        own |= {"format": _FORMAT, "processes": self._processes.count, "data": self._data}
        # A setting that came after the checkpoint was written stands at its default, which is what was done then.
        then = asdict(TrainConfig()) | state["config"] | state["head"]
        then |= {name: state.get(name) for name in ("format", "processes", "data")}
        changed = {k: (then.get(k), own.get(k)) for k in sorted({*then, *own}) if then.get(k) != own.get(k)}
        if changed:
            raise ValueError(
                f"{self.out_dir} was trained otherwise, so it cannot be resumed; (then, now): {changed}. Give what was "
                f"given then, or another folder"
            )
        parts = self._optimizer.parts
        self._processes.load(self._objective, state["weights"], parts, state["optimizer"])
        self._averages = [average.to(self._processes.device) for average in state["averages"]]
        self._at = _Progress(**state["progress"])
        self._report.start(self._at.step, state["report"])
