"""What a run's gradients and logits say about it, and its alarms."""
