"""The Triton kernels, one family a file: its launchers above, its kernels below."""
