"""What a save costs the training thread, beside the bare head over the same rows: SmolLM2-135M's shape, bfloat16.

    python tests/benchmarks/capture_logits.py

Medians of A B A B rounds: the head alone in chunks, then `capture` of each form. The loop's own wait is compared with a
synchronous torch.save of the same logits.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from logits_cases import NO_AUTOCAST, make_batch, settings  # noqa: E402

from so8t.logits import LogitsSaver  # noqa: E402
from so8t.losses import CHUNK_ROWS, ce_sum  # noqa: E402

LENGTH, HIDDEN, VOCAB, ROUNDS = 512, 576, 49152, 7


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    hidden = torch.randn(1, LENGTH, HIDDEN).bfloat16()
    head = (0.05 * torch.randn(VOCAB, HIDDEN)).bfloat16()
    batch = make_batch(1, LENGTH, VOCAB)
    ce = ce_sum(hidden, head, batch.targets)

    def bare() -> None:
        for start in range(0, LENGTH, CHUNK_ROWS):
            F.linear(hidden[0, start : start + CHUNK_ROWS], head)

    with tempfile.TemporaryDirectory() as name:
        logits = F.linear(hidden, head)
        synchronous = statistics.median(
            seconds(lambda: torch.save(logits, Path(name) / "logits.pt")) for _ in range(ROUNDS)
        )
        print(f"torch.save of the logits: {1000 * synchronous:.1f} ms, on {torch.get_num_threads()} threads")
        for form in ("full", "topk", "stats"):
            saver = LogitsSaver(settings(form=form, max_wait=60.0), Path(name) / form, NO_AUTOCAST, max_tokens=LENGTH)
            heads, captures, waits, writes = [], [], [], []
            for step in range(1, ROUNDS + 3):
                time.sleep(0.3)  # the writer has its turn, as it has while a step computes
                heads.append(seconds(bare))
                captures.append(seconds(partial(saver.capture, step, 0, batch, hidden, head, ce)))
                figures = saver.figures()
                waits.append(figures["logits_wait_ms"])
                writes.append(figures.get("logits_write_seconds", 0.0))
                saver.after_step(step)
            saver.close()
            # the first two rounds allocate the buffers
            bare_time, capture_time = statistics.median(heads[2:]), statistics.median(captures[2:])
            print(
                f"{form}: head {1000 * bare_time:.0f} ms, capture {1000 * capture_time:.0f} ms = "
                f"{capture_time / bare_time:.2f} x; wait {statistics.median(waits[2:]):.2f} ms = "
                f"{statistics.median(waits[2:]) / (10 * synchronous):.1f} % of torch.save; "
                f"writer {1000 * statistics.median(writes[2:]):.0f} ms a file"
            )


if __name__ == "__main__":
    main()
