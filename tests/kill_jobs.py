"""Jobs that a test kills: a small training run and a small regeneration, each a pure function of its folder's state.

They run in processes of their own (see `test_kill`), so they take paths and plain values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fakes import tiny_llama, tiny_target
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from haast.heads.feat_extrapolator import FeatExtrapolatorConfig
from haast.prompts import Prompt
from haast.target.target import Target
from haast.training import make_head as making
from haast.training.config import RegenerateConfig, TrainConfig
from haast.training.data import TokenSequence
from haast.training.features import stream_examples
from haast.training.generation_queue import AnswerRun
from haast.training.make_head import read_plan, settings_of
from haast.training.plan import Plan
from haast.training.regenerate import regenerate
from haast.training.target_weights import TargetWeights
from haast.training.trainer import Trainer

VOCAB = 64
ANSWERS = 24


def train(folder: Path, resume: bool, views: int) -> None:
    """Train in `folder`, with a checkpoint at every step, a metrics line at every other, and a few evaluations."""
    torch.set_num_threads(1)
    target = tiny_target(vocab=VOCAB)
    draws = torch.Generator().manual_seed(0)
    tokens = [torch.randint(VOCAB, (14 + i % 5,), generator=draws).tolist() for i in range(12)]
    sequences = [TokenSequence(t, [False] * 4 + [True] * (len(t) - 4)) for t in tokens]
    examples = [example for _, example in sorted(stream_examples(target, sequences, topk=8))]
    config = TrainConfig(
        views=views,
        draft_vocab=48,
        batch_tokens=60,
        feature_noise=0.2,
        ema=0.9,
        log_every=60,
        evaluate_every=views // 4,
        checkpoint_every=1,
    )
    sizes, weights = FeatExtrapolatorConfig.for_target(target.config), TargetWeights.of(target)
    parts = (config, sizes, weights, examples[:9], examples[9:])
    Trainer(*parts, folder, measure_tau=lambda head, vocab: 1.5, quiet=True).run(resume)


def answer(folder: Path, resume: bool, length: int) -> None:
    """Answer prompts into `folder`/answers.jsonl; going on is what it does anyhow, so `resume` changes nothing."""
    torch.set_num_threads(1)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    make: Any = PreTrainedTokenizerFast  # its constructor is untyped
    prompts = [
        Prompt(f"p{i}", (" ".join(f"w{(7 * i + j) % VOCAB}" for j in range(1 + i % 4)),)) for i in range(ANSWERS)
    ]
    config = RegenerateConfig(batch=3, max_new_tokens=length, seed=5)
    target = tiny_target(vocab=VOCAB)
    regenerate(
        target,
        AnswerRun(make(tokenizer_object=words), prompts, folder / "answers.jsonl", config, name="tiny", quiet=True),
    )


def make_head(folder: Path, resume: bool, views: int) -> None:
    """Prompts to a head in `folder`; going on is what it does anyhow, so `resume` changes nothing."""
    torch.set_num_threads(1)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    make: Any = PreTrainedTokenizerFast  # its constructor is untyped
    model: Any = tiny_llama(VOCAB)
    target = Target(model.float(), make(tokenizer_object=words))
    prompts = [
        Prompt(f"p{i}", (" ".join(f"w{(7 * i + j) % VOCAB}" for j in range(1 + i % 4)),)) for i in range(ANSWERS)
    ]
    answering = RegenerateConfig(batch=3, max_new_tokens=20, seed=5)
    settings = TrainConfig(
        views=views, draft_vocab=48, batch_tokens=60, log_every=60, evaluate_every=views // 4, checkpoint_every=60
    )
    shared = settings_of("tiny", prompts, answering, settings, 3, None)
    plan = read_plan(folder, shared) or Plan(ANSWERS, 20.0, views, (0.0, 0.0, 0.0))
    making.make_head(target, "tiny", prompts, folder, plan, shared, answering, settings)
