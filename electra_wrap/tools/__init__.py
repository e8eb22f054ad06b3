"""Commands that are not part of a run."""
