"""Compiles every kernel of the standard DCGAN ahead of time, without a GPU, and says what came out:
`python -m fastdcgan_kernels.inspect [--arch sm_90,gfx942] [--dtype bf16] [--json]`. Not here: any
measure of speed.

launches.py records what blocks launch, compiling.py compiles it, assembly.py reads what the
compiler made, report.py puts it together.
"""
