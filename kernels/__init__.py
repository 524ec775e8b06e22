"""The arithmetic on packed tokens: torch functions that say what is meant, and in `gpu/` the Triton
kernels that compute the same faster. `choice.py` says which of them a device runs."""
