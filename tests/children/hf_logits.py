"""Logits of a converted discriminator and generator for the inputs of an .npz."""

import sys

import numpy as np
import torch
from transformers import ElectraForMaskedLM, ElectraForPreTraining

directory, source, target = sys.argv[1:]
inputs = {
    name: torch.tensor(value)
    for name, value in zip(("input_ids", "attention_mask", "token_type_ids"), np.load(source).values(), strict=True)
}
logits = {}
for network, model_class in {"discriminator": ElectraForPreTraining, "generator": ElectraForMaskedLM}.items():
    model, report = model_class.from_pretrained(f"{directory}/{network}", output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        logits[network] = model.eval()(**inputs).logits.numpy()
np.savez(target, **logits)
