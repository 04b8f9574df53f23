"""MtpChain: several MTP layers, of which layer d drafts at depth d (DeepSeek-V3, arXiv 2412.19437, section 2.2).

Layer k reads what layer k - 1 gave one position earlier, with the token that follows. So all layers of a slot, the one
of the pair that ends in x_{i+1}, are paired with the same token and predict the same next one, each from further back:

    slot of        x_i          x_{i+1}
    layer 0        f_{i-1}      f_i              features of the target
    layer 1        a_{i-2}      a_{i-1}          a: output of layer 0 in the slot before; and so on
    draft          depth 0      depth 1: layer 1 reads a of the slot before, of the node's parent
                                depth 2: layer 2, ...

Past the last layer, layer 0 recurses: its output stands for the feature that the target has not computed yet. A state
holds the outputs of all layers in a slot, and the number of its depth, 0 for features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from haast.heads.module import cache_arguments
from haast.heads.mtp import MtpHead
from haast.target.kv_cache import KVCache
from haast.target.native_cpu import NativeStack


class MtpChain(MtpHead):
    """See the module docstring. States are (rows, nodes, layers * hidden + 1)."""

    def fuse(self, features: Tensor) -> Tensor:
        empty = features.new_zeros(*features.shape[:-1], (len(self.layers) - 1) * self.config.hidden_size + 1)
        return torch.cat([features, empty], dim=-1)

    def continued(self, states: Tensor, before: Sequence[Tensor | None]) -> Tensor:
        hidden = self.config.hidden_size
        for row, last in enumerate(before):
            if last is not None:  # to where `forward` looks for the slot before the first
                states[row, 0, hidden:-1] = last[: -hidden - 1]
        return states

    def native_stack(self, window: int = 0) -> NativeStack | None:
        return None

    def forward(
        self,
        embeddings: Tensor,
        states: Tensor,
        position_ids: Tensor,
        bias: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """As `DraftModule.forward`. States of features must come first, those of neighbouring pairs in order."""
        read, depth = self._parts(states)
        rotary = self.rotary(embeddings, position_ids=position_ids)
        shared = {"position_ids": position_ids, "position_embeddings": rotary, **cache_arguments(cache)}
        outputs: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            state = read[0]
            if number:
                before = torch.cat([read[number][:, :1], outputs[-1][:, :-1]], dim=1)
                state = torch.where(depth == 0, before, read[number - 1])
            arguments = {**shared, "attention_mask": _from_slot(number, bias)}
            output = self.run_layer(number, layer, embeddings, state, arguments)
            outputs.append(self.final_norm(output, number) if self.config.norm_output else output)
        return torch.cat([*outputs, depth + 1], dim=-1)

    def normed(self, states: Tensor) -> Tensor:
        parts, depth = self._parts(states)
        if not self.config.norm_output:
            parts = [self.final_norm(part, number) for number, part in enumerate(parts)]
        layer = (depth.long() - 1).clamp(0, len(parts) - 1)  # (rows, nodes, 1)
        return torch.stack(parts, dim=-2).take_along_dim(layer.unsqueeze(-1), dim=-2).squeeze(-2)

    def _parts(self, states: Tensor) -> tuple[list[Tensor], Tensor]:
        """The layers' outputs (rows, nodes, hidden), and the depth (rows, nodes, 1)."""
        return list(states[..., :-1].chunk(len(self.layers), dim=-1)), states[..., -1:]


def _from_slot(first: int, bias: Tensor | None) -> Tensor | None:
    """The mask without the slots before `first`, for which a layer has no pair at the beginning of a text."""
    if bias is None or not first:
        return bias
    early = torch.arange(bias.shape[-1], device=bias.device) < first
    return bias.masked_fill(early, torch.finfo(bias.dtype).min)
