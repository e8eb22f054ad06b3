"""What describes a training: scalars, evaluations, model cards and reports."""
