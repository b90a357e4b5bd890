"""One thread per test process: same bits on every machine, and quicker than two on small tensors."""
import os

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():  # then Triton's kernels run in its interpreter; it reads this when it is first imported
    os.environ["TRITON_INTERPRET"] = "1"
