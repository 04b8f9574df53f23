"""A loss of your own, a smoothed distillation of the teacher's best tokens, next to the loss of Haast.

python examples/own_loss.py answers.jsonl valid.jsonl runs; no loss can change the text, it changes tau alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor

from haast.target.load import load_target
from haast.target.target import Target
from haast.training import Loss, TrainConfig, TrainingData, train


class SmoothedTopK(Loss):
    """Cross-entropy against the teacher's `k` best tokens, renormalised, and a share `smoothing` for all tokens alike.

    Args:
        k: number of the teacher's tokens.
        smoothing: 0 to 1; share of the uniform distribution over the draft vocabulary in the labels.
    """

    def __init__(self, k: int = 4, smoothing: float = 0.05) -> None:
        self.name = f"smoothed top-k, k={k}, smoothing={smoothing:g}"  # a run resumes with these settings only
        self._k, self._smoothing = k, smoothing

    def __call__(self, logits: Tensor, ids: Tensor, probs: Tensor) -> Tensor:
        log_q = logits.log_softmax(-1)  # (n, draft vocabulary)
        top = probs[:, : self._k]
        # A row of zeros has none of the teacher's tokens in the draft vocabulary: it has nothing to teach.
        top = top / top.sum(-1, keepdim=True).clamp_min(1e-6)
        distilled = -(top * log_q.gather(1, ids[:, : self._k])).sum(-1)
        return (1 - self._smoothing) * distilled - self._smoothing * log_q.mean(-1)


def main(answers: str, valid: str, out: str, target: Target | None = None, settings: TrainConfig | None = None) -> None:
    """Train one head with each loss, on the same answers in the same order, and print what each reached."""
    target = load_target() if target is None else target
    data = TrainingData(answers=Path(answers), valid_prompts=Path(valid))
    settings = settings or TrainConfig(views=500_000)
    for folder, loss in (("cross-entropy", None), ("smoothed", SmoothedTopK())):
        result = train(target, data, Path(out) / folder, settings, loss=loss)
        print(f"{folder:14} tau {result['tau']:.3f}  {result['head']}")


if __name__ == "__main__":
    main(*sys.argv[1:4])
