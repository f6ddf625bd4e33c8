"""How a training step is computed fast, on CPUs and GPUs. Where to begin: fast.py."""

import os

# Large tensors of a CPU stand on huge pages, where Linux lets a process ask for them: an update allocates gigabytes
# anew, and the system makes and clears each page when it is first touched (docs/speed.md). PyTorch reads this at its
# first tensor, which is one of torch.distributed's; nothing of engine/ can be imported before this line.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
