"""Home of the Triton kernels, imported as `tvfast.kernels`. It has none yet."""
