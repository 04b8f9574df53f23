"""The training loop of a FeatExtrapolator (EAGLE, arXiv 2401.15077, section 3.2; loss weights from our own ablation).

Owns steps, schedule, checkpoints, metrics and the choice of the best head by measured tau. Knows neither the engine (it
is handed `measure_tau`) nor how a head is stored for users. A run is a pure function of its configuration and data: a
resumed run repeats the loss curve bit for bit on the same CPU and thread count.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from haast.heads.feat_extrapolator import FeatExtrapolator, FeatExtrapolatorConfig
from haast.training import checkpoints
from haast.training.alignment import chain_passes
from haast.training.batches import BatchOrder, Example, PackedBatch, pack, usable
from haast.training.config import TrainConfig
from haast.training.findings import Finding
from haast.training.frozen import Frozen, check_sizes, choose_draft_vocab
from haast.training.losses import feature_loss, teacher_cross_entropy
from haast.training.optimizer import HeadOptimizer
from haast.training.report import Reporter, Watcher
from haast.training.whitened import Scales, WhitenedHead, load_plain, plain_weights

__all__ = ["Explain", "Frozen", "MeasureTau", "Trainer", "choose_draft_vocab", "plain_weights"]

MeasureTau = Callable[[FeatExtrapolator, Tensor], float]  # (head in eval mode, draft vocabulary ids) -> tau
Explain = Callable[[dict[str, float], Tensor], list[Finding]]  # (an evaluation, draft vocabulary ids) -> what is wrong
_TAU_IS_ONE = 1.05  # a head below this drafts nothing that is accepted
_EARLY = 0.2  # share of the run before which a tau of one is no alarm


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
    best_tau: float = 0.0


class Trainer:
    """Trains one head.

    Args:
        config: settings.
        head_config: sizes of the head.
        frozen: the target's ends.
        train: sequences to learn from.
        valid: held-out sequences for cross-entropy and top-1 agreement.
        out_dir: checkpoints, `metrics.jsonl`, `best/`.
        measure_tau: the real engine on validation prompts; None leaves selection to the validation cross-entropy.
        export: how a head is stored, (folder, head, draft vocabulary) -> None; None stores a bare `head.pt`.
        start_from: plain weights of a head to start from (see `initialise`); None is noise.
        quiet: no terminal output.
        explain: looks for the causes of a tau of about 1; None raises the alarm alone.
        watchers: follow the metrics, see `report.Watcher`.

    Raises:
        ValueError: nothing to train on, sizes that do not fit, or a folder that cannot be written.
    """

    def __init__(
        self,
        config: TrainConfig,
        head_config: FeatExtrapolatorConfig,
        frozen: Frozen,
        train: Sequence[Example],
        valid: Sequence[Example],
        out_dir: Path,
        measure_tau: MeasureTau | None = None,
        export: Callable[[Path, FeatExtrapolator, Tensor], None] | None = None,
        start_from: dict[str, Tensor] | None = None,
        quiet: bool = False,
        explain: Explain | None = None,
        watchers: Sequence[Watcher] = (),
    ) -> None:
        self.config, self.head_config, self.out_dir = config, head_config, out_dir
        self.train_set, self.valid_set = usable(train), usable(valid)
        self._order = BatchOrder([e.pairs for e in self.train_set], config.batch_tokens, config.seed)
        check_sizes(head_config, frozen, self.train_set[0])
        checkpoints.write_probe(out_dir)
        self._measure_tau, self._export, self._explain = measure_tau, export, explain
        self.draft_vocab = choose_draft_vocab(self.train_set, len(frozen.head), config.draft_vocab, frozen.eos_ids)
        scales = Scales.measure(self.train_set, frozen.embeddings)
        self.head = WhitenedHead(head_config, scales, config.output_init, config.seed)
        if start_from is not None:
            load_plain(self.head, start_from)
        self._embeddings = frozen.embeddings / scales.embedding
        self._rows = (frozen.head[self.draft_vocab] * scales.feature).contiguous()  # (draft vocabulary, hidden)
        self._bias = None if frozen.bias is None else frozen.bias[self.draft_vocab]
        self._draft_index = torch.full((len(frozen.head),), -1).index_put(
            (self.draft_vocab,), torch.arange(len(self._rows))
        )
        self._averages = [p.detach().clone() for p in self.head.parameters()] if config.ema else []
        self._optimizer = HeadOptimizer(self.head.parameters(), config)
        self._noise = torch.Generator().manual_seed(config.seed)
        self._at = _Progress()
        self._report = Reporter(config.views, out_dir / "metrics.jsonl", quiet, watchers)

    def run(self, resume: bool = False) -> dict[str, float]:
        """Train to the end (or Ctrl-C, which saves first). Returns the last evaluation.

        Raises:
            KeyboardInterrupt: after the checkpoint was written.
            ValueError: there is a run in the folder and `resume` is false, or its settings differ.
        """
        with closing(self._report):
            self._open(resume)
            return self._train()

    def _train(self) -> dict[str, float]:
        result: dict[str, float] = {}
        products = _matmul_precision(self.config.matmul_precision)
        with self._report.live(self._at.views), _interrupt_flag() as interrupted, products:
            for epoch, place, indices in self._order.batches(self._at.epoch, self._at.place):
                if self._at.views >= self.config.views or interrupted.is_set():
                    break
                sums = self._step(pack([self.train_set[i] for i in indices]))
                self._at.step, self._at.epoch, self._at.place = self._at.step + 1, epoch, place
                self._at.views += int(sums["views"])
                self._report.step(self._at.views, sums, self._at.tau)
                result = self._periodic() or result
        if interrupted.is_set():
            self.save()
            raise KeyboardInterrupt
        self.save()  # first: a resumed run writes the last lines again, and a failing evaluation costs no training
        self._report.line(self._at.step)
        return self.evaluate()

    def _periodic(self) -> dict[str, float] | None:
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

    def _step(self, batch: PackedBatch) -> dict[str, float]:
        loss, sums = self._loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.head.parameters(), self.config.clip)
        if not bool(torch.isfinite(norm)):
            raise ValueError(f"the gradient is not finite at step {self._at.step}: lower learning_rate and resume")
        self._optimizer.step(self.config.learning_rate_at(self._at.views))
        if self._averages:
            decay = min(self.config.ema, (1 + self._at.step) / (10 + self._at.step))
            torch._foreach_lerp_(self._averages, [p.detach() for p in self.head.parameters()], 1 - decay)
        return sums

    def _loss(self, batch: PackedBatch, training: bool = True) -> tuple[Tensor, dict[str, float]]:
        """Weighted mean of all passes, and the first pass's sums over its views."""
        scales, config = self.head.scales, self.config
        features = batch.features.to(scales.feature.dtype) / scales.feature
        if training and config.feature_noise:
            features = features + (torch.rand(features.shape, generator=self._noise) - 0.5) * config.feature_noise
        wanted = batch.wanted.to(scales.feature.dtype) / scales.feature
        ids = self._draft_index[batch.teacher_ids]
        probs = batch.teacher_probs.to(wanted.dtype) * (ids >= 0)
        ids = ids.clamp_min(0)
        total, weights, sums = torch.zeros(()), 0.0, {}
        passes = chain_passes(self.head, batch, self._embeddings, features, config.alignment_steps if training else 1)
        for number, (output, rows) in enumerate(passes):
            every = number == 0
            teacher = (ids, probs) if every else (ids[rows], probs[rows])
            ce, hits = teacher_cross_entropy(output, self._rows, *teacher, self._bias)
            regression = feature_loss(output, wanted if every else wanted[rows])
            weight = config.step_decay**number
            total = total + weight * (config.ce_weight * ce + config.feature_weight * regression)
            weights += weight
            if every:
                sums = {"ce": float(ce.detach()), "feature": float(regression.detach()), "loss": float(total.detach())}
                sums = {name: value * batch.views for name, value in sums.items()}
                sums |= {"top1": float(hits), "views": float(batch.views)}
        return total / weights, sums

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out cross-entropy, top-1 agreement and tau, with the averaged weights; keeps the best head."""
        values: dict[str, float] = {}
        with self._report.paused(), self._averaged():
            sums: dict[str, float] = {}
            if self.valid_set:
                order = BatchOrder([e.pairs for e in self.valid_set], self.config.batch_tokens, 0)
                for indices in order.epoch(0):
                    for name, value in self._loss(pack([self.valid_set[i] for i in indices]), False)[1].items():
                        sums[name] = sums.get(name, 0.0) + value
                values = {f"valid_{name}": sums[name] / sums["views"] for name in ("ce", "feature", "top1")}
            head = self.plain_head()
            if self._measure_tau is not None:
                values["tau"] = self._at.tau = float(self._measure_tau(head, self.draft_vocab))
            score = values.get("tau", 1 / (1 + values.get("valid_ce", 1.0)))
            if score >= self._at.best_tau:
                self._at.best_tau = score
                self._store(self.out_dir / "best", head)
        early = self._at.views < _EARLY * self.config.views
        alarm = "tau" in values and values["tau"] < _TAU_IS_ONE and not early
        findings = (self._explain(values, self.draft_vocab) if self._explain else []) if alarm else None
        self._report.evaluation(self._at.step, self._at.views, values, findings)
        return values

    def plain_head(self) -> FeatExtrapolator:
        """The present weights as users get them, in eval mode."""
        head = FeatExtrapolator(self.head_config).to(self.head.scales.feature.dtype)
        head.load_state_dict(plain_weights(self.head))
        return head.eval()

    def _store(self, folder: Path, head: FeatExtrapolator) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if self._export is not None:
            self._export(folder, head, self.draft_vocab)
        else:
            checkpoints.atomic_save({"weights": head.state_dict(), "draft_vocab": self.draft_vocab}, folder / "head.pt")

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        parameters = list(self.head.parameters())
        own = [p.data for p in parameters]
        for parameter, average in zip(parameters, self._averages, strict=bool(self._averages)):
            parameter.data = average
        try:
            yield
        finally:
            for parameter, data in zip(parameters, own, strict=True):
                parameter.data = data

    def save(self) -> Path:
        """Write a checkpoint; returns its path."""
        state: dict[str, Any] = {
            "config": asdict(self.config),
            "head": asdict(self.head_config),
            "examples": len(self.train_set),
            "weights": self.head.state_dict(),
            "averages": self._averages,
            "optimizer": self._optimizer.state_dict(),
            "noise": self._noise.get_state(),
            "progress": asdict(self._at),
            "report": self._report.state(),
        }
        return checkpoints.save_state(self.out_dir, state, self._at.step)

    def _open(self, resume: bool) -> None:
        state = checkpoints.load_newest(self.out_dir)
        if state is None:
            self._report.start(0)
            return
        if not resume:
            raise ValueError(f"{self.out_dir} holds a training run: resume it, or choose another folder")
        changed = {
            k: (v, asdict(self.config).get(k)) for k, v in state["config"].items() if asdict(self.config).get(k) != v
        }
        if changed or state["head"] != asdict(self.head_config) or state["examples"] != len(self.train_set):
            raise ValueError(
                f"{self.out_dir} was trained otherwise, so it cannot be resumed: settings (then, now) {changed}, "
                f"sequences {state['examples']} then, {len(self.train_set)} now"
            )
        self.head.load_state_dict(state["weights"])
        self._averages = state["averages"]
        self._optimizer.load_state_dict(state["optimizer"])
        self._noise.set_state(state["noise"])
        self._at = _Progress(**state["progress"])
        self._report.start(self._at.step, state["report"])


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    """Below "highest" fp32 products may be rounded to TF32 or bf16 where the hardware multiplies those.

    On x86 it also moves them from MKL to oneDNN, in full fp32 where there is no AMX: measured on two Zen 5 cores, 480
    against 205 GFLOP/s and 1.6 times the views a second.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _interrupt_flag() -> Iterator[threading.Event]:
    """Within, Ctrl-C sets a flag, so that a step is never cut in half; a second Ctrl-C interrupts at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def handle(_signal: int, _frame: FrameType | None) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)
