"""Weak scaling under torchrun, and the formula of the predictions."""

import pytest

from benchmarks import peers, scaling


def test_two_processes_reduce_the_gradients_of_both_nets(command):
    done = command(
        "benchmarks.scaling", "--ranks", 2, "--batch-size", 2, "--steps", 3, "--repeats", 1
    )
    assert done.returncode == 0, done.stderr
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("| 2 |"))
    nets = (peers.generator_layers(), peers.discriminator_layers())
    numbers = sum(p.numel() for layers in nets for p in peers.net(layers).parameters())
    assert numbers == 3_576_704 + 2_765_568  # the example's
    assert f"| {4 * numbers:,} |" in row
    assert f"{4 * numbers:,} bytes of gradients" in done.stdout


@pytest.mark.parametrize("n", [2, 3, 8])
def test_ring_seconds_are_those_of_a_ring(n):
    """A ring of n devices, chunk by chunk: each step every device sends one chunk of 1/n."""
    bytes, bandwidth = 24_000, 1000.0
    chunks = [[{rank} for _ in range(n)] for rank in range(n)]  # whose gradients are in the sum
    sent = 0.0
    for offset in (0, 1):  # reduce-scatter, then all-gather
        for step in range(n - 1):
            moved = [(rank, (rank + offset - step) % n) for rank in range(n)]
            parcels = [(rank, chunk, set(chunks[rank][chunk])) for rank, chunk in moved]
            for rank, chunk, content in parcels:
                chunks[(rank + 1) % n][chunk] |= content
            sent += bytes / n
    assert all(chunk == set(range(n)) for device in chunks for chunk in device)
    assert scaling.ring_seconds(bytes, n, bandwidth) == pytest.approx(sent / bandwidth)


def test_mistakes_are_one_line(command):
    done = command("benchmarks.scaling", "--ranks", 0)
    assert done.returncode == 1
    assert done.stderr == "error: --ranks (0,) was given; give numbers of processes\n"
