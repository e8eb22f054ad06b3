"""Write logits and attention keys of a converted discriminator and generator for given inputs.

Arguments: DIRECTORY INPUTS.npz OUTPUTS.npz. stdin may have a JSON list of wrong mappings, each
[network, {parameter: parameter whose value it gets, or null for zeros}]. For each, the largest
absolute difference that it makes is printed.
"""

import json
import sys

import numpy as np
import torch
from transformers import ElectraForMaskedLM, ElectraForPreTraining

torch.set_grad_enabled(False)
directory, source, target = sys.argv[1:]
names = ("input_ids", "attention_mask", "token_type_ids")
arrays = np.load(source).values()
inputs = {name: torch.tensor(value) for name, value in zip(names, arrays, strict=True)}


def infer(model):
    """Return logits and keys."""
    keys = []
    hooks = [
        layer.attention.self.key.register_forward_hook(lambda *a: keys.append(a[2]))
        for layer in model.electra.encoder.layer
    ]
    logits = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    return logits, torch.stack(keys)


models, results = {}, {}
classes = {"discriminator": ElectraForPreTraining, "generator": ElectraForMaskedLM}
for network, model_class in classes.items():
    model, report = model_class.from_pretrained(f"{directory}/{network}", output_loading_info=True)
    assert not any(report.values()), report
    models[network] = model.eval()
    results[network], results[f"{network}_keys"] = (value.numpy() for value in infer(model))
np.savez(target, **results)

differences = []
for network, changes in json.loads(sys.stdin.read() or "[]"):
    parameters = dict(models[network].named_parameters())
    kept = {name: parameters[name].clone() for name in changes}
    for name, other in changes.items():
        parameters[name].copy_(kept[other] if other else torch.zeros_like(kept[name]))
    changed = infer(models[network])
    for name, value in kept.items():
        parameters[name].copy_(value)
    expected = results[network], results[f"{network}_keys"]
    pairs = zip(changed, expected, strict=True)
    differences.append(max(float(np.abs(a.numpy() - b).max()) for a, b in pairs))
print(json.dumps(differences))
