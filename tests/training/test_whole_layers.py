"""MTP heads are trained further: passes over whole layers, and a run from an imported head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mtp_heads as mtp
import pytest
import torch
from fakes import decode, random_head, tiny_target, vanilla
from test_cli import tiny_tokenizer
from test_heads import sequences
from transformers import Qwen3Config, Qwen3ForCausalLM

from haast.drafters.factory import head_drafter
from haast.errors import HeadMismatchError
from haast.formats.opened import open_head
from haast.heads.checkpoint import Head, load_head
from haast.target.target import Target
from haast.training import TrainConfig, TrainingData, train
from haast.training.batches import pack
from haast.training.features import stream_examples
from haast.training.run import head_config
from haast.training.training_time_test import chain_passes
from haast.training.whole_layers import whole_layer_passes


def test_whole_layers_give_the_passes_of_layers_in_parts() -> None:
    """A FeatExtrapolator can be run both ways."""
    target = tiny_target(vocab=64)
    module: Any = random_head(target).module.double()
    made = sorted(stream_examples(target, sequences(6), topk=4), key=lambda pair: pair[0])
    batch = pack([example for _, example in made])
    embedded, features = target.embed(batch.next_tokens).clone(), batch.features.double()
    both = [list(run(module, batch, embedded, features, 3)) for run in (chain_passes, whole_layer_passes)]
    assert len(both[0]) == len(both[1]) == 3
    for (state, rows), (other, theirs) in zip(*both, strict=True):
        assert torch.equal(rows, theirs) and torch.allclose(state, other, rtol=0, atol=1e-10)
    first, second = both[1][0][0], next(iter(whole_layer_passes(module, batch, embedded.flip(0), features, 1)))[0]
    assert not torch.allclose(first, second)  # the control: the passes depend on what they are given


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> tuple[Target, Head, Path]:
    """A target in fp32 with a tokenizer, its MTP head, and answers to train on."""
    folder, tokenizer = tmp_path_factory.mktemp("mtp"), tiny_tokenizer()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
        "initializer_range": 0.3, "eos_token_id": None, "pad_token_id": None, "bos_token_id": None,
    }  # fmt: skip
    model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    mtp.write_checkpoint(folder / "model", model, mtp.PlainMtp(model.double(), "Qwen"))
    target = Target(model.to(torch.float32), tokenizer)  # type: ignore[arg-type]
    head, _ = open_head(folder / "model").fitted(target, probe=False)  # type: ignore[union-attr]
    texts = [{"id": str(n), "prompt": f"say {n}", "response": "one two three four " * 3} for n in range(4)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    return target, head, folder


def test_an_mtp_head_is_trained_further(started: tuple[Target, Head, Path], tmp_path: Path) -> None:
    target, head, folder = started
    settings = TrainConfig(
        head="mtp",
        optimizer="adamw",
        views=3000,
        draft_vocab=64,
        log_every=200,
        evaluate_every=1500,
        alignment_steps=2,
        learning_rate=5e-3,
    )
    result = train(target, TrainingData(answers=folder / "answers.jsonl"), tmp_path, settings, start_from=head)
    trained = load_head(Path(result["head"]))
    assert trained.module.config == head.module.config and trained.about["settings"]["head"] == "mtp"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["ce"] for line in lines if "ce" in line]
    assert losses[-1] < 0.8 * losses[0]
    prompt = [list(range(5, 13))]
    assert decode(target, head_drafter(target, trained), prompt, 8) == vanilla(target, prompt, 8)
    assert "MTP head" in (Path(result["head"]) / "README.md").read_text(encoding="utf-8")


def test_what_can_not_be_trained_is_refused(started: tuple[Target, Head, Path]) -> None:
    target, head, _ = started
    with pytest.raises(ValueError, match="is trained further, from an MTP head"):
        head_config(TrainConfig(head="mtp"), target)
    with pytest.raises(ValueError, match="is trained further, from an MTP head"):
        head_config(TrainConfig(head="mtp"), target, random_head(target))
    with pytest.raises(ValueError, match="leave out layers, markov_rank"):
        TrainConfig(head="mtp", layers=2)
    with pytest.raises(HeadMismatchError, match="its vocab_size is"):
        head_config(TrainConfig(head="mtp"), tiny_target(), head)
