"""Everything that touches google-research/electra: its checkout, its scripts, its TensorFlow 1 surface."""
