"""Merges of live weights that are spread over ranks: DTensors of FSDP2 and tensor parallelism."""
