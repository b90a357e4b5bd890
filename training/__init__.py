"""Training: optimizer step, metrics, evaluation, CUDA graph, processes."""
