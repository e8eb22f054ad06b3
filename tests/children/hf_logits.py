"""Logits and attention keys of a converted discriminator and generator for the inputs of an .npz.

With a list of mutations, each a list of [network, {parameter: parameter whose value it gets, or null for zeros}]
on stdin: the largest absolute difference that each mutation makes, as JSON. (What a conversion would write if
its mapping had those rows wrong.)
"""

import json
import sys

import numpy as np
import torch
from transformers import ElectraForMaskedLM, ElectraForPreTraining

directory, source, target = sys.argv[1:]
inputs = {
    name: torch.tensor(value)
    for name, value in zip(("input_ids", "attention_mask", "token_type_ids"), np.load(source).values(), strict=True)
}


def answer(model):
    keys = []
    layers = model.electra.encoder.layer
    hooks = [layer.attention.self.key.register_forward_hook(lambda *a: keys.append(a[2])) for layer in layers]
    with torch.no_grad():
        logits = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    return logits, torch.stack(keys)


models, results = {}, {}
for network, model_class in {"discriminator": ElectraForPreTraining, "generator": ElectraForMaskedLM}.items():
    model, report = model_class.from_pretrained(f"{directory}/{network}", output_loading_info=True)
    assert not any(report.values()), report
    models[network] = model.eval()
    results[network], results[f"{network}_keys"] = (value.numpy() for value in answer(model))
np.savez(target, **results)

differences = []
for network, changes in json.loads(sys.stdin.read() or "[]"):
    parameters = dict(models[network].named_parameters())
    kept = {name: parameters[name].detach().clone() for name in changes}
    with torch.no_grad():
        for name, other in changes.items():
            parameters[name].copy_(kept[other] if other else torch.zeros_like(kept[name]))
    found = answer(models[network])
    with torch.no_grad():
        for name, value in kept.items():
            parameters[name].copy_(value)
    expected = results[network], results[f"{network}_keys"]
    differences.append(max(float(np.abs(a.numpy() - b).max()) for a, b in zip(found, expected, strict=True)))
print(json.dumps(differences))
