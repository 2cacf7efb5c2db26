"""Merges by the processes of a `torchrun`, through the store of torch.distributed."""

from tvfast.distributed.communicator import Group, join

__all__ = ["Group", "join"]
