"""speculators' side of speculators_logits.py: its own classes load heads, make heads, and run them. Knows no Haast."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from speculators import SpeculatorModel, SpeculatorModelConfig
from speculators.config import SpeculatorsConfig, VerifierConfig
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.models.peagle import PEagleDraftModel, PEagleSpeculatorConfig
from speculators.models.peagle import core as peagle
from speculators.proposals.greedy import GreedyTokenProposalConfig
from transformers import AutoConfig


class _EnoughError(Exception):
    """The logits of a P-EAGLE head are there; its loss, which comes next, needs a GPU."""


def logits_of(model: Any, inputs: dict[str, torch.Tensor], depths: int) -> torch.Tensor:
    """(depths, places, draft vocabulary): what the LM head gives while the model runs as it does in training."""
    features, ids = inputs["features"], inputs["ids"]
    places, found, at_once = ids.shape[1] - depths + 1, list[torch.Tensor](), isinstance(model, PEagleDraftModel)

    def keep(_module: Any, _given: Any, output: torch.Tensor) -> None:
        found.append(output.detach())
        if at_once:
            raise _EnoughError

    hook = model.lm_head.register_forward_hook(keep)
    given: dict[str, Any] = {"document_ids": torch.zeros_like(ids), "loss_mask": torch.ones_like(ids)}
    with torch.no_grad(), suppress(_EnoughError):
        if at_once:
            # It trains on a random part of all places; here on all that have `depths` tokens after them.
            anchors, depth = torch.arange(places).repeat(depths), torch.arange(depths).repeat_interleave(places)
            peagle.generate_cod_sample_indices = lambda **_given: (anchors, depth)
            last = torch.zeros(1, ids.shape[1], model.hidden_size)
            model(features, ids, verifier_last_hidden_states=last, num_depths=depths, **given)
        else:
            model(features, ids, ttt_steps=depths, **given)
    hook.remove()
    return found[0].view(depths, places, -1) if at_once else torch.stack([each[0, :places] for each in found])


def loaded(folder: str) -> Any:
    """A head by speculators' own loader, with attention that needs no blocks of 128 tokens."""
    config: Any = SpeculatorModelConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    return SpeculatorModel.from_pretrained(folder, config=config)


def made(form: dict[str, Any], target: str) -> Any:
    """A random head of speculators' own, with a random draft vocabulary."""
    torch.manual_seed(form["seed"])
    layers = AutoConfig.for_model(form["layers"], **form["sizes"])
    layers._attn_implementation = "eager"
    masked = "mask_token_id" in form["options"]
    kind: Any = PEagleSpeculatorConfig if masked else Eagle3SpeculatorConfig
    proposals = [GreedyTokenProposalConfig(speculative_tokens=3)]
    about = SpeculatorsConfig(
        algorithm="peagle" if masked else "eagle3",
        proposal_methods=proposals,
        default_proposal_method="greedy",
        verifier=VerifierConfig.from_pretrained(target),
    )
    config = kind(transformer_layer_config=layers, speculators_config=about, **form["options"])
    model: Any = (PEagleDraftModel if masked else Eagle3DraftModel)(config)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape) * 0.3
        parameter.data = drawn + 1 if "norm" in name else drawn
    vocab, drafts = model.verifier_vocab_size, model.draft_vocab_size
    if drafts != vocab:
        ids = torch.randperm(vocab)[:drafts].sort().values
        inside = torch.zeros(vocab, dtype=torch.bool).index_fill(0, ids, True)
        model.load_vocab_mappings(inside, ids - torch.arange(drafts))
    return model


def main() -> None:
    """Load heads and make heads, run all of them, and write their logits."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    failed: dict[str, str] = {}
    for name, each in request["heads"].items():
        try:
            if "form" in each:
                model = made(each["form"], request["target"]).eval()
                model.save_pretrained(each["folder"])
            else:
                model = loaded(each["folder"]).float().eval()
            logits = logits_of(model, load_file(each["inputs"]), request["depths"])
            save_file({"logits": logits.contiguous()}, each["logits"])
        except Exception as error:  # one head that speculators refuses is no reason not to try the others
            failed[name] = f"{type(error).__name__}: {error}"
    versions = {name: version(name) for name in ("speculators", "torch", "transformers")}
    Path(sys.argv[2]).write_text(json.dumps({"failed": failed, "versions": versions}), encoding="utf-8")


if __name__ == "__main__":
    main()
