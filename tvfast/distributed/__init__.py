"""Merges by the processes of a `torchrun`, through the store of torch.distributed."""

import gc
import os

# A lost rank is one message of ours; the store's client would print the stack of every question beside it.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# Half a million objects of torch are made, none of them garbage: looking for some takes a tenth of the time.
_collects = gc.isenabled()
gc.disable()
try:
    from tvfast.distributed.communicator import Group, join
finally:
    if _collects:
        gc.enable()

__all__ = ["Group", "join"]
