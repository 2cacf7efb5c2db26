"""Merges by the processes of a `torchrun`, through the store of torch.distributed."""

import os

# A lost rank is one message of ours; the store's client would print the stack of every question beside it.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from tvfast.distributed.communicator import Group, join

__all__ = ["Group", "join"]
