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
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm, DeepseekV3TopkRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRMSNorm, Glm4MoeTopkRouter
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextDecoderLayer

from haast.core import SamplingParams
from haast.drafters.eagle import EagleDrafter
from haast.drafters.factory import head_drafter
from haast.drafters.tree_shape import DraftShape
from haast.formats.base import TargetFacts
from haast.formats.opened import OpenedHead, facts_of, open_head
from haast.formats.probe import module_of
from haast.heads.checkpoint import Head, build_module
from haast.target.target import Target

FORMS = [  # producers, the number of layers, and whether the normed state is fed back
    *(("Qwen", 1, True), ("DeepSeek", 1, False), ("GLM", 2, True), ("MiMo", 1, True)),
    *(
        pytest.param(each, marks=pytest.mark.slow)
        for each in (("GLM", 1, True), ("DeepSeek", 2, False), ("MiMo", 3, True), ("Qwen", 1, False))
    ),
]
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
DEPTH = 4
Proposal = tuple[list[int], Any, list[Tensor]]  # tokens known, tree, and the logits of each level


@pytest.fixture(autouse=True, scope="module")
def in_fp64() -> Iterator[None]:
    """Transformers' norms and routers compute in fp32, in which the last bit of an fp64 value can become a 1e-7."""

    def forward(self: Any, states: Tensor) -> Tensor:
        scale = (states.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        normed: Tensor = states * scale * self.weight
        return normed

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


@pytest.fixture(scope="module", params=FORMS, ids=str)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A target, its plain MTP head of some depths, and the folder of its checkpoint."""
    producer, depths, normed = request.param
    model = mtp.tiny_model(producer)
    plain = mtp.PlainMtp(model, producer, depths, normed)
    return Target(model), plain, mtp.write_checkpoint(tmp_path_factory.mktemp(producer), model, plain)


def drafter_of(target: Target, plain: mtp.PlainMtp, folder: Path, shape: DraftShape) -> EagleDrafter:
    opened = open_head(folder)
    assert isinstance(opened, OpenedHead) and (opened.kind, opened.drafter_kind) == ("mtp", "eagle")
    reading, questions = opened.read(facts_of(target))
    assert {"state read", "fed back"} <= {question.name for question in questions}
    module = module_of(target, reading.with_config(norm_output=plain.norm_output))
    drafter = head_drafter(target, Head(module, None, {}), shape)
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

    drafter.observe, drafter.propose, drafter._lm_head = observing, proposing, Recorded()  # type: ignore[method-assign, assignment]
    return proposals


def features_of(target: Target, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return target.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0]  # type: ignore[no-any-return]


def test_a_chain_of_four_has_the_logits_of_the_plain_forward(checkpoint: Any) -> None:
    target, plain, folder = checkpoint
    drafter = drafter_of(target, plain, folder, DraftShape("chain", depth=DEPTH))
    proposals = spied(drafter)
    assert decode(target, drafter, [PROMPT], 10) == vanilla(target, [PROMPT], 10)
    assert len(proposals) > 3
    for known, tree, levels in proposals:
        features, path = features_of(target, known)[:-1], tree.tokens[0, 1:].tolist()
        assert len(levels) == DEPTH
        for depth, logits in enumerate(levels):
            expected = plain.logits(features, known, path[:depth])
            torch.testing.assert_close(logits[0, 0], expected, rtol=0, atol=1e-9)
    plain.norm_output = not plain.norm_output  # the control: another convention shows from the second depth on
    other = [plain.logits(features, known, path[:depth]) for depth in range(DEPTH)]
    plain.norm_output = not plain.norm_output
    apart = [float((logits[0, 0] - each).abs().max()) for logits, each in zip(levels, other, strict=True)]
    assert min(apart[1:]) > 1e-3


def test_the_layer_of_a_hybrid_family_is_its_full_attention_with_experts(tmp_path: Path) -> None:
    model = mtp.tiny_model("Qwen3-Next")
    plain = mtp.PlainMtp(model, "Qwen3-Next")
    opened = open_head(mtp.write_checkpoint(tmp_path, model, plain))
    assert isinstance(opened, OpenedHead)
    reading, _ = opened.read(TargetFacts(model.config))
    module: Any = build_module(reading.config, None).double().eval()
    module.load_state_dict(reading.weights)
    assert type(module.layers[0]) is Qwen3NextDecoderLayer
    embedding: Any = model.get_input_embeddings()
    lm_head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    features = states = torch.randn(
        len(PROMPT) - 1, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    path: list[int] = []
    for _ in range(DEPTH):
        known = torch.tensor([[*PROMPT[1:], *path]])
        with torch.no_grad():
            output = module(embedding(known), states.unsqueeze(0), torch.arange(len(states))[None])[0, -1:]
            logits = lm_head(module.lm_input(output, known))[0]
        torch.testing.assert_close(logits, plain.logits(features, PROMPT, path), rtol=0, atol=1e-9)
        states, path = torch.cat([states, output]), [*path, int(logits.argmax())]


def plain_tree(plain: mtp.PlainMtp, features: Tensor, known: list[int], shape: DraftShape) -> set[tuple[int, ...]]:
    """The paths of EAGLE-2's tree: the best candidates below the best of each level, by probability of the path."""
    frontier: dict[tuple[int, ...], float] = {(): 0.0}
    candidates: dict[tuple[int, ...], float] = {}
    for _ in range(shape.depth):
        level: dict[tuple[int, ...], float] = {}
        for path, score in frontier.items():
            best = plain.logits(features, known, path).log_softmax(-1).topk(shape.top_k)
            level |= {(*path, t): score + p for p, t in zip(best.values.tolist(), best.indices.tolist(), strict=True)}
        candidates |= level
        frontier = dict(sorted(level.items(), key=lambda each: -each[1])[: shape.width])
    return set(sorted(candidates, key=lambda path: -candidates[path])[: shape.nodes - 1])


def paths_of(tree: Any) -> set[tuple[int, ...]]:
    tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        paths.append((*paths[parent], token))
    return set(paths[1:])


def test_trees_are_those_of_the_plain_forward(checkpoint: Any) -> None:
    target, plain, folder = checkpoint
    shape = DraftShape(nodes=10, depth=DEPTH, top_k=3, width=2)
    drafter = drafter_of(target, plain, folder, shape)
    proposals = spied(drafter)
    decode(target, drafter, [PROMPT], 5)
    assert len(proposals) > 1
    for known, tree, _ in proposals:
        assert paths_of(tree) == plain_tree(plain, features_of(target, known)[:-1], known, shape)


def test_text_is_vanillas_greedy_and_sampled_in_a_batch_with_early_ends(checkpoint: Any) -> None:
    target, plain, folder = checkpoint
    drafter = drafter_of(target, plain, folder, DraftShape(nodes=8, depth=3, top_k=3, width=3))
    prompts = [PROMPT, [7, 7, 2], [30, 1, 30, 1, 30, 2]]
    sampled = [SamplingParams(temperature=1.0, top_p=0.9, seed=seed) for seed in range(3)]
    for sampling in (None, sampled):
        expected = vanilla(target, prompts, 9, sampling)
        assert decode(target, drafter, prompts, 9, sampling) == expected
        end = expected[1][4]
        ended = [text[: text.index(end) + 1] if end in text else text for text in expected]
        assert decode(target, drafter, prompts, 9, sampling, eos=(end,)) == ended
