"""What the compiler makes of the kernels, without a GPU: the static report, and the search for configurations."""
