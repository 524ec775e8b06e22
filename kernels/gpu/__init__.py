"""The Triton kernels. Each computes what the torch function of the same name beside it defines."""
