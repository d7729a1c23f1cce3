"""Prints the convergence suite's table as Markdown: `python -m tests.convergence`. It judges
nothing; test_convergence.py does."""

import torch

from tests.convergence.nets import NETS
from tests.convergence.training import HEAD, compare, rows


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = [torch.float32, torch.bfloat16, *([torch.float16] if device == "cuda" else [])]
    print(HEAD)
    for net in NETS.values():
        for dtype in dtypes:
            print(*rows(compare(net, device, dtype)), sep="\n", flush=True)


if __name__ == "__main__":
    main()
