"""Runs a FeatExtrapolator in native calls: `NativeHead` over committed pairs, `NativeDraft` for a whole tree.

Owns the pointers that the native code reads: head, embedding and plan. Gives the states and trees that `EagleDrafter`
gives by tensor operations (tests compare them), without the overhead of the operators.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from haast import native
from haast.drafters.candidates import CandidateRows
from haast.drafters.tree_shape import Plan
from haast.heads.acceptance import Source
from haast.heads.feat_extrapolator import FeatExtrapolator
from haast.heads.module import DraftModule
from haast.native.stack import CDraft, CHead, CPairs, CProposal, CWeight, Refusal, run_commit, run_draft
from haast.target.native_cpu import (
    NativeStack,
    embedding_weight,
    fingerprint,
    int64s,
    memory_of,
    refuse,
    weight_of,
)
from haast.target.packing import PackedLinear, is_packed
from haast.tree import DraftTree
from haast.tuning.policy import CostModel


class NativeHead:
    """A head's two kinds of forward: committed pairs (`commit`), and a draft (`NativeDraft`). Create with `of`."""

    def __init__(self, stack: NativeStack, module: FeatExtrapolator, embedding: nn.Module, table: CWeight) -> None:
        """Use `of`, which checks the arguments; `table` is the embedding's structure."""
        fc, context = module.fc, module.context if module.config.layer_ids else None
        assert is_packed(fc) and (context is None or is_packed(context)), "a packed module has packed linears"
        self.stack: NativeStack = stack
        self._modules: list[nn.Module] = [embedding, fc, *([] if context is None else [context])]
        self._referenced: list[object] = [memory_of(self._modules)]  # keeps alive what `structure` points to
        self._built_from = fingerprint(self._modules)
        lower = CWeight() if context is None else weight_of(context, self._referenced)
        self.structure: CHead = CHead(stack.pointer, weight_of(fc, self._referenced), lower, table)
        self.width: int = stack.hidden + lower.inputs  # of features

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is None, like a copy of a `NativeStack`: pointers can't be copied."""
        return type(None), ()

    def current(self) -> bool:
        """Whether embedding, `fc` and context are unchanged; the stack has a check of its own."""
        return fingerprint(self._modules) == self._built_from

    @classmethod
    def of(cls, embedding: nn.Module, module: DraftModule, stack: NativeStack | None) -> NativeHead | None:
        """Create one for a plain FeatExtrapolator on a packed target; None for any other head or embedding."""
        if stack is None or type(module) is not FeatExtrapolator:
            return None
        config = module.config
        if config.markov_rank or config.norms or config.inputs != "feature+shifted-token":
            return None
        table = embedding_weight(embedding)
        return None if table is None else cls(stack, module, embedding, table)

    def commit(
        self,
        tokens: Tensor,
        features: Tensor,
        past: Sequence[int] | Tensor,
        tables: Tensor,
        store: Tensor,
        shift: int = 1,
    ) -> Tensor:
        """Run the head over pairs after each row's committed ones, and store their keys and values.

        Args:
            tokens: (rows, n) int64, each the token after the feature's position.
            features: (rows, n, `width`) fp32: the layers that the head reads, as in `Drafter.target_layers`.
            past, tables, store, shift: as for `NativeDraft.propose`; `tables` reach n slots further.

        Returns:
            the head's states, (rows, n, hidden).

        Raises:
            ValueError: shapes or dtypes do not match, or a token is not in the vocabulary; nothing was computed.
        """
        rows, pairs = tokens.shape
        blocks, form = self.stack.check_store(store, tables, rows, shift)
        tokens, features = tokens.contiguous(), features.contiguous()
        if tokens.dtype is not torch.int64 or features.dtype is not torch.float32 or not tokens.is_cpu:
            raise ValueError(f"tokens are {tokens.dtype}, features {features.dtype}: give int64 and fp32, on the CPU")
        if features.shape != (rows, pairs, self.width) or not features.is_cpu:
            raise ValueError(
                f"features have shape {tuple(features.shape)} on {features.device}: give {(rows, pairs, self.width)}, "
                "on the CPU"
            )
        lengths, lengths_at = int64s("past", past, rows)
        output = features.new_empty(rows, pairs, self.stack.hidden)
        cosine, sine, angles = self.stack.angles()
        arguments = CPairs(
            tokens.data_ptr(), lengths_at, features.data_ptr(), output.data_ptr(), store.data_ptr(), cosine, sine,
            blocks, rows, pairs, angles, form,
        )  # fmt: skip
        refused = run_commit(self.structure, arguments)
        if refused == -Refusal.FEW_ANGLES:
            last = max(map(int, lengths)) + pairs
            arguments.cosine, arguments.sine, arguments.angles = self.stack.angles(last)
            refused = run_commit(self.structure, arguments)
        if refused == -Refusal.STRANGE_TOKEN:
            raise ValueError(
                f"tokens are from {int(tokens.min())} to {int(tokens.max())}, the embedding has ids from 0 to "
                f"{self.structure.embedding.outputs - 1}"
            )
        if refused:
            refuse(refused, lengths, pairs, store, tables, shift)
        return output


class NativeDraft:
    """Drafts a head's trees. Create with `of`; `plan` sets the tree, `propose` drafts it."""

    def __init__(self, head: NativeHead, lm_head: PackedLinear, vocab: Tensor | None) -> None:
        """Use `of`, which checks the arguments."""
        self._head = head
        self._draft: CDraft = CDraft(ctypes.pointer(head.structure))
        self._lm_head: tuple[PackedLinear, int] | None = None  # and the address of its weights
        self.draft_over(lm_head, vocab)
        self._nodes: int = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is None, like a copy of a `NativeHead`."""
        return type(None), ()

    @classmethod
    def of(cls, head: NativeHead | None, lm_head: nn.Module, vocab: Tensor | None) -> NativeDraft | None:
        """Create one; None without a native head, and for LM heads that are not packed."""
        if head is None or not is_packed(lm_head) or lm_head.reference:
            return None
        return cls(head, lm_head, vocab)

    def draft_over(self, lm_head: PackedLinear, vocab: Tensor | None) -> None:
        """Draft with another LM head from now on; `vocab` are the ids of its outputs, None if they are the ids."""
        read = lm_head, lm_head.packed.data_ptr()
        if read != self._lm_head:
            self._lm_head, kept = read, list[object]([vocab, memory_of([lm_head])])
            self._draft.lm, self._referenced_by_lm = weight_of(lm_head, kept), kept
            self._draft.vocab = None if vocab is None else vocab.data_ptr()

    def plan(self, plan: Plan, pace: CostModel | None, curves: Source | None = None) -> bool:
        """Set the plan of the next proposals; False if the native code does not support it.

        `curves` map the head's scores to probabilities of acceptance; None leaves them as they are.
        """
        if plan.top_k > native.MOST_TOP:
            return False
        draft, keep = self._draft, plan.keep
        frontier = None if plan.frontier is None else [index for level in plan.frontier for index in level]
        counts = [_array(ctypes.c_int64, numbers) for numbers in (plan.widths, frontier, keep)]
        costs = None if pace is None else _array(ctypes.c_float, pace.forward_ms)
        self._nodes = plan.nodes if pace is None or keep is not None else min(plan.nodes, len(pace.forward_ms))
        draft.top_k, draft.levels, draft.nodes = plan.top_k, len(plan.widths), self._nodes
        both = () if curves is None else (curves.greedy, curves.sampled)
        knots = _array(ctypes.c_float, [score for curve in both for score in curve.scores])
        chances = _array(ctypes.c_float, [chance for curve in both for chance in curve.chances])
        self._arrays = (*counts, costs, knots, chances)
        pointers = [None if each is None else ctypes.addressof(each) for each in self._arrays]
        draft.widths, draft.frontier, draft.keep, draft.forward_ms, draft.knots, draft.chances = pointers
        draft.greedy_knots, draft.sampled_knots = [len(curve.scores) for curve in both] or (0, 0)
        if pace is not None:
            draft.level_ms, draft.rate = pace.level_ms, pace.rate
            draft.trust, draft.follow = pace.trust, pace.follow
        self._room = sum(plan.widths)
        self._levels = len(plan.widths)
        return True

    @property
    def room(self) -> int:
        """Slots that a proposal uses after the committed ones."""
        return self._room

    def propose(
        self,
        states: Tensor,
        roots: Tensor,
        past: Sequence[int] | Tensor,
        tables: Tensor,
        store: Tensor,
        shift: int = 1,
        *,
        others: CandidateRows | None = None,
        setting: Sequence[tuple[float, float]] | None = None,
    ) -> tuple[DraftTree, Tensor]:
        """One tree per row, and what the head says of its nodes: see `Growth.head_scores`.

        Args:
            states: (rows, hidden) fp32 at the roots.
            roots: (rows,) int64.
            past: committed slots per row, ints or (rows,) int64; `tables` reach `room` slots further.
            tables: (rows, blocks) int32 block tables, see `NativeStack.run`.
            store: the head's keys and values, see `NativeStack.run`.
            shift: slots of a table before the head's first: its pair for token i + 1 is in token i + 1's slot.
            others: drafts of another source, which compete with the head's.
            setting: per row, how the curves are used: see `Growth.calibrate`; None is (0, 0).

        Raises:
            ValueError: shapes or dtypes do not match; nothing was drafted.
        """
        rows, max_nodes = roots.size(0), self._nodes
        blocks, form = self._head.stack.check_store(store, tables, rows, shift)
        self._head.stack.check_states(states := states.contiguous(), rows)
        _, roots_at = int64s("roots", roots := roots.contiguous(), rows)
        lengths, lengths_at = int64s("past", past, rows)
        numbers = torch.empty(3, rows * max_nodes, dtype=torch.int64)  # tokens, parents, depths
        ancestors = torch.empty(rows * max_nodes * max_nodes, dtype=torch.bool)
        inputs, first = (states.data_ptr(), roots_at, lengths_at, store.data_ptr()), numbers.data_ptr()
        scores = torch.empty(rows * max_nodes)
        outputs = (first, first + 8 * rows * max_nodes, first + 16 * rows * max_nodes)
        setting = setting or [(0.0, 0.0)] * rows
        settings = (ctypes.c_float * (2 * rows))(*(warm for warm, _ in setting), *(more for _, more in setting))
        at = ctypes.addressof(settings)
        arrays = () if others is None else others.arrays()  # kept until the call has returned
        competing = [ctypes.addressof(each) for each in arrays] or (None, None, None)
        width, height = (0, 0) if others is None else (others.width, others.height)
        cosine, sine, angles = self._head.stack.angles()
        proposal = CProposal(
            *inputs, cosine, sine, blocks, rows, angles, form,
            at, at + 4 * rows, *competing, width, *outputs, ancestors.data_ptr(), scores.data_ptr(),
        )  # fmt: skip
        nodes = run_draft(self._draft, proposal)
        if nodes == -Refusal.FEW_ANGLES:
            last = max(map(int, lengths)) + self._levels
            proposal.cosine, proposal.sine, proposal.angles = self._head.stack.angles(last)
            nodes = run_draft(self._draft, proposal)
        if nodes < 0:
            refuse(nodes, lengths, self._room, store, tables, shift)
        tokens, parents, depths = numbers[:, : rows * nodes].view(3, rows, nodes)
        seen = ancestors[: rows * nodes * nodes].view(rows, nodes, nodes)
        live = torch.ones(rows, nodes, dtype=torch.bool)
        tree = DraftTree(tokens, parents, depths, seen, live, min(max(self._levels + 1, height), nodes - 1))
        return tree, scores[: rows * nodes].view(rows, nodes)


def _array(kind: type[Any], numbers: Sequence[float] | None) -> Any:
    """Numbers as a C array, of length 1 or more; None for None."""
    return None if numbers is None else (kind * max(len(numbers), 1))(*numbers)
