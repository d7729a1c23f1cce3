"""Policy: how a block runs and with which tiles. No kernels here, and no Triton."""
