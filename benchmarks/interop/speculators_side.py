"""speculators' side of speculators_logits.py: its classes load, create and run heads. Does not import Haast."""

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


class _LogitsDoneError(Exception):
    """Stops a P-EAGLE head after its logits, because its loss needs a GPU."""


def logits_of(model: Any, inputs: dict[str, torch.Tensor], depths: int) -> torch.Tensor:
    """Logits (depths, places, draft vocabulary) of the LM head in a training forward."""
    features, ids = inputs["features"], inputs["ids"]
    places, outputs, parallel = ids.shape[1] - depths + 1, list[torch.Tensor](), isinstance(model, PEagleDraftModel)

    def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        outputs.append(output.detach())
        if parallel:
            raise _LogitsDoneError

    hook = model.lm_head.register_forward_hook(keep)
    common: dict[str, Any] = {"document_ids": torch.zeros_like(ids), "loss_mask": torch.ones_like(ids)}
    with torch.no_grad(), suppress(_LogitsDoneError):
        if parallel:
            # P-EAGLE trains on a random sample of places; use all places that have `depths` tokens after them.
            anchors, depth = torch.arange(places).repeat(depths), torch.arange(depths).repeat_interleave(places)
            peagle.generate_cod_sample_indices = lambda **_: (anchors, depth)
            last = torch.zeros(1, ids.shape[1], model.hidden_size)
            model(features, ids, verifier_last_hidden_states=last, num_depths=depths, **common)
        else:
            model(features, ids, ttt_steps=depths, **common)
    hook.remove()
    return outputs[0].view(depths, places, -1) if parallel else torch.stack([each[0, :places] for each in outputs])


def load_head(folder: str) -> Any:
    """Load a head with speculators' loader; eager attention does not need blocks of 128 tokens."""
    config: Any = SpeculatorModelConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    return SpeculatorModel.from_pretrained(folder, config=config)


def random_head(form: dict[str, Any], target: str) -> Any:
    """Create a random head of speculators, with a random draft vocabulary."""
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
        values = torch.randn(parameter.shape) * 0.3
        parameter.data = values + 1 if "norm" in name else values
    vocab, drafts = model.verifier_vocab_size, model.draft_vocab_size
    if drafts != vocab:
        ids = torch.randperm(vocab)[:drafts].sort().values
        inside = torch.zeros(vocab, dtype=torch.bool).index_fill(0, ids, True)
        model.load_vocab_mappings(inside, ids - torch.arange(drafts))
    return model


def main() -> None:
    """Load or create every head, run it, and write its logits."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    failed: dict[str, str] = {}
    for name, each in request["heads"].items():
        try:
            if "form" in each:
                model = random_head(each["form"], request["target"]).eval()
                model.save_pretrained(each["folder"])
            else:
                model = load_head(each["folder"]).float().eval()
            logits = logits_of(model, load_file(each["inputs"]), request["depths"])
            save_file({"logits": logits.contiguous()}, each["logits"])
        except Exception as error:  # report this head and continue with the others
            failed[name] = f"{type(error).__name__}: {error}"
    versions = {name: version(name) for name in ("speculators", "torch", "transformers")}
    Path(sys.argv[2]).write_text(json.dumps({"failed": failed, "versions": versions}), encoding="utf-8")


if __name__ == "__main__":
    main()
