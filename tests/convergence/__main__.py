"""Prints the convergence suite's table as Markdown: `python -m tests.convergence`. It judges
nothing; test_convergence.py does."""

import datetime

import torch

from tests.convergence.nets import NETS
from tests.convergence.training import HEAD, compare, rows


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = [torch.float32, torch.bfloat16, *([torch.float16] if device == "cuda" else [])]
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    )
    print(
        "# Seven foreign nets, trained plain and fused\n\n"
        "`python -m tests.convergence`: each net 200 steps, plain from three seeds and fused from "
        "the first; losses are means of the last 20 steps, `eval_` those on other images in "
        'evaluation. "Leaves" is how far the fused run gets out of the range of the plain ones '
        "at most, in widths of that range; a test fails from 1.5.\n\n"
        f"torch {torch.__version__}, {device} ({name}), {datetime.date.today()}. Under autocast "
        "in bfloat16 a CPU runs a fused layer in plain PyTorch where that takes no longer.\n"
    )
    print(HEAD)
    for net in NETS.values():
        for dtype in dtypes:
            print(*rows(compare(net, device, dtype)), sep="\n", flush=True)


if __name__ == "__main__":
    main()
