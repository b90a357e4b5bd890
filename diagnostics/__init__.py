"""Logit-gradient diagnostics, and the verdict and alarms of a run."""
