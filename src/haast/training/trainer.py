"""Training loop of a head (EAGLE, arXiv 2401.15077, section 3.2; EAGLE-3, arXiv 2503.01840, section 3.2).

Owns steps, schedule, checkpoints, metrics and the choice of the best head by measured tau. Does not know the engine (it
is given `measure_tau`) or the format of an exported head. A run is a pure function of its configuration and data: a
resumed run repeats the loss curve bit for bit on the same CPU and thread count, and a step of n processes equals a step
of one process that accumulates n times the batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import MISSING, asdict, dataclass, fields, replace
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
from haast.training.losses import Loss
from haast.training.objective import ALPHAS, Objective
from haast.training.optimizer import HeadOptimizer, matmul_precision
from haast.training.processes import Processes
from haast.training.report import Finding, Reporter, Watcher
from haast.training.scaled_head import make_head
from haast.training.target_weights import TargetWeights, check_sizes, choose_draft_vocab

MeasureTau = Callable[[AnyModule, Tensor], float]  # (head in eval mode, draft vocabulary ids) -> tau
Explain = Callable[[dict[str, Any], Tensor], list[Finding]]  # (an evaluation, draft vocabulary ids) -> findings
_FORMAT = 2  # of checkpoints; changes with the tensors' names
_MIN_TAU = 1.05  # below this, practically no draft is accepted
_ALARM_AFTER = 0.2  # share of the run after which a tau of about 1 raises the alarm
_TAU_MILESTONES = (1.5, 2.0, 2.4, 2.8, 3.2, 3.6)  # the result has the time to each


@dataclass
class _RunState:
    """Progress of a run. All fields are stored in checkpoints."""

    step: int = 0
    views: int = 0  # supervised tokens so far
    epoch: int = 0
    place: int = 0  # index of the next batch in the epoch
    logged: int = 0  # `views` at the last log line
    evaluated: int = 0  # `views` at the last evaluation
    saved: int = 0  # `views` at the last checkpoint
    tau: float = 0.0
    best: float = 0.0  # score of the best evaluation: its tau if measured
    worse: int = 0  # number of evaluations since the best one
    ended: bool = False  # by patience or until_tau
    seconds: float = 0.0  # spent in the loop, evaluations included


class Trainer:
    """Trains one head.

    Args:
        config: settings.
        head_config: sizes of the head; a FusedConfig's `draft_vocab_size` is set here.
        target_weights: the target's embedding and LM head.
        train: training sequences.
        valid: held-out sequences for cross-entropy and top-1 agreement.
        out_dir: folder of checkpoints, `metrics.jsonl` and `best/`.
        measure_tau: runs the real engine on validation prompts; None selects by validation cross-entropy.
        export: writes a head, (folder, head, draft vocabulary) -> None; None writes only a `head.pt`.
        start_from: initial plain weights of the head (see `initialise`); None is a random initialisation.
        draft_vocab: target ids of the draft vocabulary; None chooses the `config.draft_vocab` likeliest.
        quiet: no terminal output.
        explain: looks for the causes of a tau of about 1; None raises the alarm without findings.
        watchers: called with the metrics, see `report.Watcher`.
        on_cpu: train on the CPU even if accelerate finds an accelerator.
        console: for messages; None is stdout.
        loss: takes the place of the cross-entropy; None is the cross-entropy.
        evaluate_first: also evaluate the initial weights, so that `best/` is never worse than they are.

    Raises:
        ValueError: nothing to train on, sizes that do not match, or a folder that cannot be written.
    """

    def __init__(
        self,
        config: TrainConfig,
        head_config: HeadSizes,
        target_weights: TargetWeights,
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
        loss: Loss | None = None,
        evaluate_first: bool = False,
    ) -> None:
        self.train_set, self.valid_set = usable(train), usable(valid)
        # Checkpoints have the numbers.
        config = config.for_data(head_config.hidden_size, sum(len(each.queries()) for each in self.train_set))
        self._checkpoint = checkpoints.load_newest(out_dir)
        if self._checkpoint is not None and config.mixed_precision == "auto":  # a run goes on as it began
            config = replace(config, mixed_precision=self._checkpoint["config"].get("mixed_precision", "no"))
        self._processes = Processes(config.mixed_precision, config.shard, on_cpu)
        config = replace(config, mixed_precision=self._processes.mixed_precision)
        self.config, self.out_dir = config, out_dir
        self._order = BatchOrder([e.pairs for e in self.train_set], config.positions, config.seed)
        check_sizes(head_config, target_weights, self.train_set[0])
        self._data = digest([*self.train_set, *self.valid_set])
        if self._processes.main:
            checkpoints.write_probe(out_dir)
        self._measure_tau, self._export, self._explain = measure_tau, export, explain
        self._loss_name = None if loss is None else loss.name
        self._evaluate_first = evaluate_first
        stored = self.train_set[0].topk_ids.shape[1]
        if config.teacher_top > stored:
            raise ValueError(
                f"teacher_top={config.teacher_top} is more than the {stored} tokens per position in the data"
            )
        if self._checkpoint is not None:  # the checkpoint's rows belong to these ids
            draft_vocab = self._checkpoint.get("draft_vocab", draft_vocab)
        if draft_vocab is None:
            draft_vocab = choose_draft_vocab(
                self.train_set, len(target_weights.lm_head), config.draft_vocab, target_weights.eos_ids
            )
        self.draft_vocab = draft_vocab
        self.head = make_head(config, head_config, target_weights, self.train_set, draft_vocab)
        self.head_config = self.head.config
        if start_from is not None:
            self.head.load_plain(start_from)
        self._objective = self._processes.prepare(
            Objective(self.head, target_weights, draft_vocab, config, self._processes.device, loss)
        )
        trained = [(name, p) for name, p in self._objective.named_parameters() if p.requires_grad]
        self._averages = [p.detach().clone() for _, p in trained] if config.ema else []
        self._optimizer = HeadOptimizer(trained, config)
        self._state = _RunState()
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
            ValueError: the folder has a run and `resume` is false, or its settings differ.
        """
        with closing(self._report):
            self._start_or_resume(resume)
            return self._train()

    def _train(self) -> dict[str, Any]:
        result: dict[str, Any] = {}
        stopped, products = False, matmul_precision(self.config.matmul_precision)
        with self._report.live(self._state.views), interrupt_flag() as interrupted, products:
            batches, start = self._order.batches(self._state.epoch, self._state.place), time.monotonic()
            before = self._state.seconds
            if self._evaluate_first and not self._state.step:
                self.evaluate()
            while self._state.views < self.config.views and not self._state.ended:
                stopped = self._processes.any(interrupted.is_set())
                if stopped:
                    break
                self._advance(batches)
                self._state.seconds = before + time.monotonic() - start
                result = self._log_evaluate_save() or result
        if stopped:
            self.save()
            raise KeyboardInterrupt
        self.save()  # before the evaluation, so that a failed evaluation loses no training
        if not (self._state.ended and result):
            self._report.line(self._state.step)
            with self._report.evaluating():
                result = self.evaluate()
        evaluations = [line for line in self._report.lines() if "seconds" in line]
        seconds_to_tau = dict[str, float]()  # until an evaluation first measured each milestone
        for line, milestone in product(evaluations, _TAU_MILESTONES):
            if line.get("tau", 0.0) >= milestone:
                seconds_to_tau.setdefault(str(milestone), line["seconds"])
        return result | {"seconds": self._state.seconds, "seconds_to_tau": seconds_to_tau, "metrics": evaluations}

    def _advance(self, batches: Iterator[tuple[int, int, list[int]]]) -> None:
        """One step: each process takes its share of the next batches."""
        share = self.config.accumulate
        step_batches = [next(batches) for _ in range(share * self._processes.count)]
        first = share * self._processes.index
        local = step_batches[first : first + share]
        sums = self._step([pack([self.train_set[i] for i in indices], self.head.reads) for _, _, indices in local])
        self._state.step, (self._state.epoch, self._state.place, _) = self._state.step + 1, step_batches[-1]
        self._state.views += int(sums["views"])
        self._report.step(self._state.views, sums, self._state.tau)

    def _log_evaluate_save(self) -> dict[str, Any] | None:
        """Write a log line, evaluate and save a checkpoint if due; returns the evaluation."""
        state, config, result = self._state, self.config, None
        if state.views - state.logged >= config.log_every:
            self._report.line(state.step)
            state.logged = state.views
        if state.views - state.evaluated >= config.evaluate_every and state.views < config.views:
            state.evaluated = state.views
            result = self.evaluate()
        if state.views - state.saved >= config.checkpoint_every:
            state.saved = state.views
            self.save()
        return result

    def _step(self, batches: Sequence[PackedBatch]) -> dict[str, float]:
        """Gradients of all batches of all processes, and one optimiser step; returns sums over supervised tokens."""
        config, totals = self.config, dict[str, Tensor]()
        for number, batch in enumerate(batches):
            seed = self._seed(self._processes.index * len(batches) + number)
            noise = self._noise(batch, seed)
            batch = batch.to(self._processes.device)
            sharpness = config.sharpness_at(self._state.views)
            with self._processes.autocast():
                loss, sums = self._objective(batch, noise, sharpness, config.passes_at(self._state.views), seed)
            self._processes.backward(self._objective, loss, sync=number == len(batches) - 1)
            for name in ("views", "loss", "ce", "feature", "top1", "accepted"):
                totals[name] = totals.get(name, torch.zeros(())) + sums.get(name, torch.zeros(())).cpu()
        step_sums = self._processes.sums(totals)
        for parameter in self._objective.parameters():
            if parameter.grad is not None:
                parameter.grad /= step_sums["views"]
        norm = self._processes.clip(self._objective, config.clip)
        if not norm < float("inf"):
            raise ValueError(
                f"the gradient is not finite at step {self._state.step}: start a new run in another folder with a "
                f"lower learning_rate, or from {self.out_dir / 'best'}"
            )
        self._optimizer.step(config.learning_rate_at(self._state.views))
        if self._averages:
            decay = min(config.ema, (1 + self._state.step) / (10 + self._state.step))
            trained = [p.detach() for p in self._objective.parameters() if p.requires_grad]
            get_ema_multi_avg_fn(decay)(self._averages, trained, 0)  # type: ignore[no-untyped-call]
        return step_sums

    def _seed(self, number: int) -> int:
        """Seed of the random draws for a batch: depends on the run's seed, the step and the batch's index in it."""
        return (self.config.seed * 1_000_003 + self._state.step) * 1024 + number

    def _noise(self, batch: PackedBatch, seed: int) -> Tensor | None:
        """Uniform noise on the batch's features."""
        width = self.config.feature_noise
        if not width:
            return None
        generator = torch.Generator().manual_seed(seed)
        noise = (torch.rand(batch.features.shape, generator=generator) - 0.5) * width
        return noise.to(self._processes.device)

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Held-out cross-entropy, agreement by depth and tau, with the averaged weights; stores the best head."""
        values: dict[str, Any] = {}
        with self._report.paused(), self._use_averages():
            if self.valid_set:
                values = self._held_out()
            weights = self._processes.weights(self._objective)  # a collective operation: all processes take part
            head = self._plain_head(weights) if self._processes.main else None
            if self._measure_tau is not None:
                tau = 0.0 if head is None else float(self._measure_tau(head, self.draft_vocab))
                values["tau"] = self._state.tau = self._processes.broadcast(tau)
            score = self._processes.broadcast(values.get("tau", 1 / (1 + values.get("valid_ce", 1.0))))
            self._state.worse = 0 if score >= self._state.best else self._state.worse + 1
            if score >= self._state.best:
                self._state.best = score
                if head is not None:
                    self._save_head(self.out_dir / "best", head)
        patience, until_tau, state = self.config.patience, self.config.until_tau, self._state
        state.ended = bool(patience and state.worse >= patience) or bool(until_tau and state.tau >= until_tau)
        early = state.views < _ALARM_AFTER * self.config.views
        alarm = "tau" in values and values["tau"] < _MIN_TAU and not early and self._processes.main
        reported = values | {"seconds": round(state.seconds, 1)}
        findings = (self._explain(values, self.draft_vocab) if self._explain else []) if alarm else None
        self._report.evaluation(state.step, state.views, reported, findings)
        return values

    def _held_out(self) -> dict[str, Any]:
        """Means over held-out supervised tokens; `valid_alpha[n]`: agreement if n of the head's inputs are its own."""
        order, sums = BatchOrder([e.pairs for e in self.valid_set], self.config.positions, 0), dict[str, float]()
        for indices in order.epoch(0):
            batch = pack([self.valid_set[i] for i in indices], self.head.reads).to(self._processes.device)
            for name, value in self._objective(batch, passes=ALPHAS)[1].items():
                sums[name] = sums.get(name, 0.0) + float(value)
        kinds = ("ce", "feature", "top1", "accepted") if self.head.regresses else ("ce", "top1", "accepted")
        values: dict[str, Any] = {f"valid_{name}": sums[name] / sums["views"] for name in kinds}
        depths = [i for i in range(ALPHAS) if sums.get(f"tried_{i}")]
        return values | {"valid_alpha": [round(sums[f"right_{i}"] / sums[f"tried_{i}"], 4) for i in depths]}

    def plain_head(self) -> AnyModule:
        """The head with the current weights as users get it, in eval mode (on the main process)."""
        with self._use_averages():
            return self._plain_head(self._processes.weights(self._objective))

    def _plain_head(self, weights: dict[str, Tensor]) -> AnyModule:
        return self.head.plain({name.removeprefix("head."): tensor for name, tensor in weights.items()})

    def _save_head(self, folder: Path, head: AnyModule) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if self._export is not None:
            self._export(folder, head, self.draft_vocab)
        else:
            checkpoints.atomic_save({"weights": head.state_dict(), "draft_vocab": self.draft_vocab}, folder / "head.pt")

    @contextmanager
    def _use_averages(self) -> Iterator[None]:
        parameters = [p for p in self._objective.parameters() if p.requires_grad]
        current = [p.data for p in parameters]
        for parameter, average in zip(parameters, self._averages, strict=bool(self._averages)):
            parameter.data = average
        try:
            yield
        finally:
            for parameter, data in zip(parameters, current, strict=True):
                parameter.data = data

    def save(self) -> None:
        """Write a checkpoint."""
        state: dict[str, Any] = {
            "format": _FORMAT,
            "config": asdict(self.config),
            "loss": self._loss_name,
            "head": asdict(self.head_config),
            "data": self._data,
            "draft_vocab": self.draft_vocab,
            "processes": self._processes.count,
            "weights": self._processes.weights(self._objective),
            "averages": self._averages,
            "optimizer": self._processes.optimizer_state(self._objective, self._optimizer.parts),
            "progress": asdict(self._state),
            "report": self._report.state(),
        }
        if self._processes.main:
            checkpoints.save_state(self.out_dir, state, self._state.step)
        self._processes.wait()

    def _start_or_resume(self, resume: bool) -> None:
        state = self._checkpoint
        if state is None:
            self._report.start(0, {"lines": 0})  # an evaluation of the initial weights has step 0
            return
        if not resume:
            raise ValueError(f"{self.out_dir} has a training run: resume it, or choose another folder")
        now = asdict(self.config) | asdict(self.head_config)
        now |= {"format": _FORMAT, "processes": self._processes.count, "data": self._data, "loss": self._loss_name}
        # The default of a setting that is newer than the checkpoint is what the old run did.
        sizes = {each.name: each.default for each in fields(self.head_config) if each.default is not MISSING}
        then = asdict(TrainConfig()) | sizes | state["config"] | state["head"]
        then |= {name: state.get(name) for name in ("format", "processes", "data", "loss")}
        changed = {k: (then.get(k), now.get(k)) for k in sorted({*then, *now}) if then.get(k) != now.get(k)}
        if changed:
            raise ValueError(
                f"{self.out_dir} was trained with other settings, so it cannot be resumed; (then, now): {changed}. "
                f"Use the same settings, or another folder"
            )
        parts = self._optimizer.parts
        self._processes.load(self._objective, state["weights"], parts, state["optimizer"])
        self._averages = [average.to(self._processes.device) for average in state["averages"]]
        self._state = _RunState(**state["progress"])
        self._report.start(self._state.step, state["report"])
