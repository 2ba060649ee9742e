"""The loss head beside the plain cross-entropy and its floor, two bare products; SmolLM2's sizes, float32.

python tests/benchmarks/head.py
"""

import statistics
import time
from collections.abc import Callable

import shared  # noqa: F401
import torch
import torch.nn.functional as F

from so8t.losses import Head, ce_sum
from so8t.memory.live_bytes import LiveBytes

HIDDEN, VOCAB, ROWS = 576, 49152, 1005
ROUNDS = 7


def main() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(1, ROWS, HIDDEN).requires_grad_()
    weight, targets = torch.randn(VOCAB, HIDDEN) * 0.05, torch.randint(VOCAB, (1, ROWS))

    def two_products() -> None:
        with torch.no_grad():
            F.linear(hidden, weight) @ weight

    def plain() -> None:
        torch.autograd.backward(F.cross_entropy(F.linear(hidden, weight)[0], targets[0], reduction="sum"))

    def ours() -> None:
        torch.autograd.backward(ce_sum(hidden, Head(weight), targets))

    forms: dict[str, Callable[[], None]] = {"two products": two_products, "plain": plain, "ce_sum": ours}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(ROUNDS):  # side by side, because other processes come and go
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            seconds[name].append(time.perf_counter() - start)
    floor = statistics.median(seconds["two products"])
    for name, form in forms.items():
        live = LiveBytes()
        live.hold([hidden, weight, targets])
        inputs = live.now
        with live:
            form()
        median, peak = statistics.median(seconds[name]), (live.peak - inputs) / 2**20
        print(f"{name:14s} {median:.3f} s, {median / floor:.2f} x two products, peak {peak:.0f} MiB beside its inputs")


if __name__ == "__main__":
    main()
