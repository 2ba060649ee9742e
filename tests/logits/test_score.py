"""The passes over logits that scoring takes, beside torch's plain ones."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from so8t.logits.score import FEW_THREADS, HostTransfer, Scorer, _largest

VALUES = st.sampled_from([-torch.inf, -1.0, 0.0, 2.0, torch.inf, torch.nan])  # few, so that there are ties


@settings(deadline=None)
@given(st.sampled_from([1, 7, 512, 513, 640]), st.data())
def test_the_largest_logit_and_its_place_are_those_of_max(vocab: int, data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, vocab - 1), max_size=4, unique=True))
    logits = torch.full((2, vocab), -2.0)
    for place in places:
        logits[0, place] = data.draw(VALUES)
    maximum, expected = _largest(logits), logits.max(dim=-1, keepdim=True)
    torch.testing.assert_close(maximum, tuple(expected), rtol=0, atol=0, equal_nan=True)


class Threads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes how many threads each softmax has."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._softmax.default:
            self.seen.add(torch.get_num_threads())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("threads", "scoring"), [(2, 1), (FEW_THREADS, 1), (FEW_THREADS + 1, FEW_THREADS + 1)])
def test_few_threads_score_as_one_and_are_as_many_again_afterwards(threads: int, scoring: int) -> None:
    names = ("label_logprob", "logsumexp", "entropy", "label_rank", "top1_id", "top1_logprob")
    host = {name: torch.empty(2) for name in names}
    targets, stored, device = torch.tensor([1, 2]), torch.ones(2, dtype=torch.bool), torch.device("cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with Threads() as mode:
            Scorer(targets, stored, host, device, HostTransfer(device)).add(torch.arange(2), torch.zeros(2, 8))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert mode.seen == {scoring}
