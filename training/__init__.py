"""What both training scripts call: flags, data, networks, the step, checkpoints and the run directory."""
