"""MTP heads in a target's own checkpoint draft exactly as the plainest forward says; other models' are refused."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import mtp_heads as mtp
import pytest
import torch
from fakes import decode, vanilla
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm, DeepseekV3TopkRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRMSNorm, Glm4MoeTopkRouter
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from haast.core import SamplingParams
from haast.drafters.eagle import EagleDrafter
from haast.drafters.factory import head_drafter
from haast.drafters.tree_shape import DraftShape
from haast.formats.opened import OpenedHead, open_head
from haast.target.target import Target

PRODUCERS = ("Qwen", "DeepSeek", "GLM", "MiMo")
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
DEPTH = 4
Proposal = tuple[list[int], Any, list[Tensor]]  # tokens known, tree, and the logits of each level


@pytest.fixture(autouse=True, scope="module")
def in_fp64() -> Iterator[None]:
    """Transformers' norms and routers compute in fp32, in which the last bit of an fp64 value can become a 1e-7."""

    def forward(self: Any, states: Tensor) -> Tensor:
        scaled: Tensor = states * (states.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return scaled * self.weight

    def routed(self: Any, states: Tensor, forward: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "type", lambda tensor, *_: tensor)
            return forward(self, states)

    with pytest.MonkeyPatch.context() as patch:
        for router in (DeepseekV3TopkRouter, Glm4MoeTopkRouter):
            patch.setattr(router, "forward", partialmethod(routed, forward=router.forward))
        for kind in (Qwen3RMSNorm, DeepseekV3RMSNorm, Glm4MoeRMSNorm, Qwen2RMSNorm):
            patch.setattr(kind, "forward", forward)
        yield


@pytest.fixture(scope="module", params=[*((each, 1) for each in PRODUCERS), ("GLM", 2), ("MiMo", 3)], ids=str)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A target, its plain MTP head of some depths, and the folder of its checkpoint."""
    producer, depths = request.param
    return written(producer, tmp_path_factory.mktemp(producer), depths)


def written(producer: str, folder: Path, depths: int = 1) -> tuple[PreTrainedModel, mtp.PlainMtp, Path]:
    model = mtp.tiny_model(producer)
    plain = mtp.PlainMtp(model, producer, depths)
    return model, plain, mtp.write_checkpoint(folder, model, plain)


def drafter_of(target: Target, folder: Path, shape: DraftShape) -> EagleDrafter:
    opened = open_head(folder)
    assert isinstance(opened, OpenedHead) and (opened.kind, opened.drafter_kind) == ("mtp", "eagle")
    drafter = head_drafter(target, opened.fitted(target, probe=False)[0], shape)
    assert isinstance(drafter, EagleDrafter)
    return drafter


def spied(drafter: EagleDrafter) -> list[Proposal]:
    """What the drafter proposes for a single row."""
    proposals: list[Proposal] = []
    known, levels = list(PROMPT[:1]), list[Tensor]()
    observe, propose, children = drafter.observe, drafter.propose, drafter._lm_head

    def observing(states: Any, accepted: Any) -> None:
        known.extend(accepted.host_tokens()[0])
        observe(states, accepted)

    def proposing(*given: Any) -> Any:
        levels.clear()
        tree = propose(*given)
        proposals.append((list(known), tree, list(levels)))
        return tree

    class Recorded(torch.nn.Module):
        def forward(self, states: Tensor) -> Tensor:
            levels.append(children(states))
            return levels[-1]

    drafter.observe, drafter.propose, drafter._lm_head = observing, proposing, Recorded()  # type: ignore[method-assign]
    return proposals


def features_of(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0]  # type: ignore[no-any-return]


def test_a_chain_of_four_has_the_logits_of_the_plain_forward(checkpoint: Any) -> None:
    model, plain, folder = checkpoint
    target = Target(model)
    drafter = drafter_of(target, folder, DraftShape("chain", depth=DEPTH))
    proposals = spied(drafter)
    assert decode(target, drafter, [PROMPT], 16) == vanilla(target, [PROMPT], 16)
    assert len(proposals) > 3
    for known, tree, levels in proposals:
        assert len(levels) == DEPTH
        features = features_of(model, known)[:-1]
        for depth, logits in enumerate(levels):
            path = tree.tokens[0, 1 : 1 + depth].tolist()
            expected = plain.logits(features, known, path)
            torch.testing.assert_close(logits[0, 0], expected, rtol=0, atol=1e-9)
