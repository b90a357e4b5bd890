"""One training step and what it needs: device, processes, CUDA graph, metrics, evaluation."""
