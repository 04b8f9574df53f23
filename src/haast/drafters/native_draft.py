"""A FeatExtrapolator's proposal in one native call: `NativeDraft`.

Owns what the native code reads: pointers to the head, the embedding and the plan. It proposes the very trees that
`EagleDrafter` grows by tensor operations (a test holds them together), without the operators between them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from haast import native
from haast.drafters.tree_shape import Plan
from haast.heads.feat_extrapolator import FeatExtrapolator
from haast.heads.module import DraftModule
from haast.native.stack import CDraft, CProposal, Refusal, run_draft
from haast.target.native_cpu import NativeStack, int64s, refuse, weight_of
from haast.target.packing import PackedLinear, is_packed
from haast.tree import DraftTree
from haast.tuning.policy import CostModel


class NativeDraft:
    """Build with `of`; `plan` says what to draft, `propose` drafts it."""

    def __init__(
        self,
        stack: NativeStack,
        module: FeatExtrapolator,
        lm_head: PackedLinear,
        embedding: Tensor,
        vocab: Tensor | None,
    ) -> None:
        """Take what `of` has checked."""
        fc = module.fc
        assert is_packed(fc), "a packed module has packed linears"
        self._stack: NativeStack = stack
        self._held: tuple[object, ...] = (fc, lm_head, embedding, vocab)  # what the structure points to
        self._draft: CDraft = CDraft(fc=weight_of(fc), lm=weight_of(lm_head), embedding=embedding.data_ptr())
        self._draft.stack = stack.pointer
        self._draft.vocab = None if vocab is None else vocab.data_ptr()
        self._nodes: int = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is None, as a copy of a `NativeStack` is."""
        return type(None), ()

    @classmethod
    def of(
        cls,
        embedding: nn.Module,
        module: DraftModule,
        stack: NativeStack | None,
        lm_head: nn.Module,
        vocab: Tensor | None,
    ) -> NativeDraft | None:
        """For a plain FeatExtrapolator on a packed target; None for any other head or embedding."""
        if stack is None or not isinstance(module, FeatExtrapolator) or not is_packed(lm_head):
            return None
        sizes = module.config
        if sizes.markov_rank or sizes.norms or sizes.inputs != "feature+shifted-token" or lm_head.reference:
            return None
        if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
            return None
        weight = embedding.weight
        if weight.dtype is not torch.float32 or not weight.is_contiguous() or weight.device.type != "cpu":
            return None
        return cls(stack, module, lm_head, weight.detach(), vocab)

    def plan(self, plan: Plan, pace: CostModel | None) -> bool:
        """What to draft from now on; False where the native code cannot."""
        if plan.top_k > native.MOST_TOP:
            return False
        draft, keep = self._draft, plan.keep
        frontier = None if plan.frontier is None else [place for level in plan.frontier for place in level]
        counts = [_array(ctypes.c_int64, numbers) for numbers in (plan.widths, frontier, keep)]
        costs = None if pace is None else _array(ctypes.c_float, pace.forward_ms)
        self._nodes = plan.nodes if pace is None or keep is not None else min(plan.nodes, len(pace.forward_ms))
        draft.top_k, draft.levels, draft.nodes = plan.top_k, len(plan.widths), self._nodes
        self._arrays = (*counts, costs)
        places = [None if each is None else ctypes.addressof(each) for each in self._arrays]
        draft.widths, draft.frontier, draft.keep, draft.forward_ms = places
        if pace is not None:
            draft.level_ms, draft.rate = pace.level_ms, pace.rate
            draft.trust, draft.follow = pace.trust, pace.follow
        self._room = sum(plan.widths)
        self._levels = len(plan.widths)
        return True

    @property
    def room(self) -> int:
        """Slots that a proposal uses behind the committed ones."""
        return self._room

    def propose(
        self,
        states: Tensor,
        roots: Tensor,
        past: Sequence[int] | Tensor,
        tables: Tensor,
        store: Tensor,
        shift: int = 1,
    ) -> DraftTree:
        """One tree per row.

        Args:
            states: (rows, hidden) fp32 at the roots.
            roots: (rows,) int64.
            past: committed slots per row, ints or (rows,) int64; `tables` reach `room` slots further.
            tables: (rows, blocks) int32, see `NativeStack.run`.
            store: the head's keys and values, see `NativeStack.run`.
            shift: slots of a table before the head's first: its pair for token i + 1 lies at token i + 1's slot.

        Raises:
            ValueError: tensors that do not fit together; nothing was drafted.
        """
        rows, most = roots.size(0), self._nodes
        blocks, form = self._stack.check_store(store, tables, rows, shift)
        self._stack.check_states(states := states.contiguous(), rows)
        _, roots_at = int64s("roots", roots := roots.contiguous(), rows)
        lengths, lengths_at = int64s("past", past, rows)
        numbers = torch.empty(3, rows * most, dtype=torch.int64)
        ancestors = torch.empty(rows * most * most, dtype=torch.bool)
        begins, found = (states.data_ptr(), roots_at, lengths_at, store.data_ptr()), numbers.data_ptr()
        places = (found, found + 8 * rows * most, found + 16 * rows * most, ancestors.data_ptr())
        cosine, sine, angles = self._stack.angles()
        proposal = CProposal(*begins, cosine, sine, blocks, rows, angles, form, *places)
        nodes = run_draft(self._draft, proposal)
        if nodes == -Refusal.FEW_ANGLES:
            last = max(map(int, lengths)) + self._levels
            proposal.cosine, proposal.sine, proposal.angles = self._stack.angles(last)
            nodes = run_draft(self._draft, proposal)
        if nodes < 0:
            refuse(nodes, lengths, self._room, store, tables, shift)
        tokens, parents, depths = numbers[:, : rows * nodes].view(3, rows, nodes)
        seen = ancestors[: rows * nodes * nodes].view(rows, nodes, nodes)
        live, height = torch.ones(rows, nodes, dtype=torch.bool), min(self._levels + 1, nodes - 1)
        return DraftTree(tokens, parents, depths, seen, live, height)


def _array(kind: type[Any], numbers: Sequence[float] | None) -> Any:
    """Numbers as native code reads them; with room for one where there are none."""
    return None if numbers is None else (kind * max(len(numbers), 1))(*numbers)
