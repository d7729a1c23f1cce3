"""The Triton kernels, and nothing else: no shapes are chosen here, and no tensor is made."""
