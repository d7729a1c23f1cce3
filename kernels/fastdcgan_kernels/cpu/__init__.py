"""The blocks on a CPU, float32: convolutions in C++ with fewer multiplications, BatchNorm
and activation as two passes each way. Compiled with the user's compiler on first use (build.py)."""
