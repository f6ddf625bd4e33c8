"""Computes a training step fast, on CPUs and GPUs. Start with fast.py."""

import os

# Large CPU tensors use huge pages where Linux allows it, because an update allocates gigabytes anew and the system
# clears each page on first touch (docs/speed.md). PyTorch reads this variable at its first tensor, which
# torch.distributed creates, so this line must run before any other module of engine/ is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
