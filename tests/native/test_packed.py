"""On the packed CPU path a node has the same bits whatever stands beside it: lossless without a footnote about ties."""

from __future__ import annotations

import pytest
import torch
from fakes import commit
from gguf_files import write_model
from transformers import LlamaConfig, LlamaForCausalLM

from haast import native
from haast.core import SamplingParams
from haast.drafters.base import Drafter
from haast.drafters.eagle import EagleDrafter
from haast.drafters.tree_shape import DraftShape
from haast.drafters.vanilla import VanillaDrafter
from haast.engine.engine import Engine, Stats, StopParams
from haast.heads.checkpoint import Head
from haast.heads.feat_extrapolator import FeatExtrapolator, FeatExtrapolatorConfig
from haast.target.fusing import fuse_small_modules
from haast.target.load import load_target
from haast.target.packing import PackedEmbedding, pack_linears
from haast.target.target import Target
from haast.tree import DraftTree

pytestmark = pytest.mark.skipif(not native.available(), reason="no native kernels")


# A file's matrices are mixed as in Q4_K_M: queries, keys and values of two types are one layer of linked parts.
MIXED = {"attn_v.weight": "Q6_K", "attn_q.weight": "Q5_0", "token_embd.weight": "Q8_0", "": "Q4_K"}
_DEFAULT = ("mixed", "Q4_1", "Q3_K")  # the other files are in the slow suite; test_blocks.py has their products
FILES: dict[str, str | dict[str, str]] = {"mixed": MIXED, **{form: form for form in native.BLOCK_FORMS}}


@pytest.fixture(
    scope="module",
    params=[
        "f16 by modules",
        "f16 in one call",
        "int8 in one call",
        *(pytest.param(f"gguf {name}", marks=[] if name in _DEFAULT else pytest.mark.slow) for name in FILES),
    ],
)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    torch.manual_seed(5)
    packing, kind = request.param.split(" ", 1)
    if packing == "gguf":
        file = write_model(tmp_path_factory.mktemp("gguf") / "tiny.gguf", kind=FILES[kind])
        loaded = load_target(str(file), packing="gguf")
        assert loaded.packing == "gguf" and loaded.one_call and isinstance(loaded.embedding, PackedEmbedding)
        return loaded
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    made = Target(LlamaForCausalLM(config))
    pack_linears(made.model, form=packing)
    swapped = fuse_small_modules(made.model)
    assert swapped == (7, 3, 3)
    if "one call" in kind:
        assert made.use_one_call() and made.one_call
    return made


def eagle(target: Target, shape: DraftShape) -> EagleDrafter:
    torch.manual_seed(7)
    module = FeatExtrapolator(FeatExtrapolatorConfig.for_target(target.config)).requires_grad_(False)
    return EagleDrafter(target, Head(module, torch.arange(0, target.vocab_size, 2), {}), shape)


def text(target: Target, drafter: Drafter, prompt: list[int], sampling: SamplingParams) -> tuple[list[int], Stats]:
    stats = Stats()
    tokens: list[int] = []
    for emission in Engine(target, drafter).run([prompt], sampling, StopParams(48), stats):
        tokens.extend(emission.tokens)
    return tokens, stats


@pytest.mark.parametrize("nodes", [2, 5, 6, 7, 12, 13, 24, 60])
def test_a_nodes_logits_and_features_have_the_same_bits_alone_and_in_a_tree(target: Target, nodes: int) -> None:
    generator = torch.Generator().manual_seed(nodes)
    prompt = torch.randint(0, target.vocab_size, (1, 11), generator=generator)
    parents = torch.tensor([[-1] + [int(torch.randint(0, i, (), generator=generator)) for i in range(1, nodes)]])
    tree = DraftTree.from_parents(torch.randint(0, target.vocab_size, (1, nodes), generator=generator), parents)
    cache = target.new_cache()
    target.forward(DraftTree.chain(prompt), cache)
    commit(cache, [range(11)])
    together = target.forward(tree, cache)  # nothing of it is kept
    path = [nodes - 1]
    while path[0]:
        path.insert(0, int(parents[0, path[0]]))
    for node in path:
        alone = target.forward(DraftTree.roots(tree.tokens[:, node]), cache)
        commit(cache, [[0]])
        assert torch.equal(alone.logits[0, 0], together.logits[0, node])
        assert torch.equal(alone.features[0, 0], together.features[0, node])


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9, seed=3)])
@pytest.mark.parametrize("kind", ["dynamic", "static", "chain"])
@pytest.mark.one_of_each
def test_drafted_text_is_vanillas(target: Target, kind: str, sampling: SamplingParams) -> None:
    for seed in range(6):
        prompt = torch.randint(0, target.vocab_size, (9,), generator=torch.Generator().manual_seed(seed)).tolist()
        wanted, _ = text(target, VanillaDrafter(), prompt, sampling)
        drafted, stats = text(target, eagle(target, DraftShape(kind, 3, 4, 4, 14)), prompt, sampling)
        assert drafted == wanted
        assert stats.target_forwards <= len(wanted)
