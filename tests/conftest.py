"""One thread per test process: same bits on every machine, and quicker than two on small tensors."""
import torch

torch.set_num_threads(1)
