"""Triton kernels, imported as `tvfast.kernels`: the backend where no compiler was at hand at install."""
