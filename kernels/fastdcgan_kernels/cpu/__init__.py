"""The blocks on a CPU, float32: the convolutions in C++ with 9 multiplications for 16, BatchNorm
and activation as two passes each way. Compiled with the user's compiler on first use (build.py)."""
