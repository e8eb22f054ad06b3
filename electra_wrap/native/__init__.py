"""The native engine: the same profile, corpus and vocabulary trained in PyTorch, equal to upstream where it counts."""
