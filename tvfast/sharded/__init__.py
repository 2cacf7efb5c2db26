"""Merges of live weights that are spread over ranks: DTensors of FSDP2, tensor parallelism and meshes of both."""
