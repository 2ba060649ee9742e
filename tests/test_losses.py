from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from so8t import losses
from so8t.data import Row, collate
from so8t.losses import NO_TARGET, Head, ce_sum, head_dtype, pet_sum
from so8t.memory.live_bytes import LiveBytes

HIDDEN, VOCAB, CHUNK_ROWS = 16, 101, 128


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of CHUNK_ROWS in float32, so that the cases here have several."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", CHUNK_ROWS * VOCAB * 4)


def our_ce(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
    return ce_sum(hidden, Head(head_weight), targets)


def random_case(
    *shape: int, vocab: int = VOCAB, dtype: torch.dtype = torch.float32, masked: float = 0.4
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, head_weight (both want gradients) and targets, a share of them masked."""
    generator = torch.Generator().manual_seed(sum(shape))
    hidden = torch.randn(*shape, HIDDEN, generator=generator).to(dtype).requires_grad_()
    head_weight = torch.randn(vocab, HIDDEN, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(vocab, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < masked] = NO_TARGET
    return hidden, head_weight, targets


def plain_ce(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
    """The loss by the book: every logit at once."""
    logits = F.linear(hidden, head_weight).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def checkpointed_ce(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
    """The reference of the same shape: chunks whose logits are computed again in the backward."""

    def of_chunk(rows: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(rows, head_weight).float(), labels, reduction="sum")

    kept = targets.flatten() != NO_TARGET
    rows, labels = hidden.flatten(0, 1)[kept], targets.flatten()[kept]
    chunks = [slice(start, start + CHUNK_ROWS) for start in range(0, len(rows), CHUNK_ROWS)]
    losses: list[Tensor] = [checkpoint(of_chunk, rows[chunk], labels[chunk], use_reentrant=False) for chunk in chunks]
    return torch.stack(losses).sum()


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def with_gradients(loss: Loss, hidden: Tensor, head_weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value = loss(hidden, head_weight, targets)
    hidden_gradient, head_gradient = torch.autograd.grad(value, (hidden, head_weight))
    return value.detach(), hidden_gradient, head_gradient


# ---- cross-entropy: the value and the gradients


@pytest.mark.parametrize("reference", [plain_ce, checkpointed_ce])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (1, CHUNK_ROWS), (1, CHUNK_ROWS + 1), (3, 2 * CHUNK_ROWS - 5)])
def test_loss_and_gradients_are_those_of_the_whole_logits(reference: Loss, shape: tuple[int, int]) -> None:
    for masked in (0.0, 0.4):
        hidden, head_weight, targets = random_case(*shape, masked=masked)
        targets[0, 0] = 3  # never all masked
        ours = with_gradients(our_ce, hidden, head_weight, targets)
        theirs = with_gradients(reference, hidden, head_weight, targets)
        assert ours[0].dtype == torch.float32
        assert ours[0].shape == ()
        for our, their in zip(ours, theirs, strict=True):
            assert torch.allclose(our, their, rtol=1e-5, atol=1e-5)


def test_float32_is_as_exact_as_float64_allows_to_see() -> None:
    hidden, head_weight, targets = random_case(3, 100)
    logits = F.linear(hidden.double(), head_weight.double())
    exact = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    exact_gradients = torch.autograd.grad(exact, (hidden, head_weight))
    loss, *gradients = with_gradients(our_ce, hidden, head_weight, targets)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    for our, their in zip(gradients, exact_gradients, strict=True):
        assert torch.allclose(our, their, rtol=0, atol=1e-5)


def test_large_logits_do_not_overflow() -> None:
    hidden, head_weight, targets = random_case(2, 9)
    ours = with_gradients(our_ce, hidden * 1e4, head_weight, targets)
    theirs = with_gradients(plain_ce, hidden * 1e4, head_weight, targets)
    assert all(torch.isfinite(tensor).all() for tensor in ours)
    assert all(torch.allclose(our, their, rtol=1e-5) for our, their in zip(ours, theirs, strict=True))


def test_in_bfloat16_the_loss_is_computed_in_float32_and_gradients_are_right_within_rounding() -> None:
    hidden, head_weight, targets = random_case(3, 200, dtype=torch.bfloat16)
    loss, *gradients = with_gradients(our_ce, hidden, head_weight, targets)
    plain_loss, *plain_gradients = with_gradients(plain_ce, hidden, head_weight, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-6)
    assert loss != loss.bfloat16()
    for our, their in zip(gradients, plain_gradients, strict=True):
        assert our.dtype == torch.bfloat16
        assert (our - their).abs().max() <= 2**-8 * their.abs().max()


def test_dividing_by_the_number_of_targets_does_not_rescale_a_bfloat16_gradient() -> None:
    hidden, head_weight, targets = random_case(2, 300, dtype=torch.bfloat16)
    num_targets = 2**10 - 3  # in bfloat16 its inverse is 0.3 % off
    assert abs(torch.tensor(1 / num_targets).bfloat16().item() * num_targets - 1) > 0.002
    (whole,) = torch.autograd.grad(our_ce(hidden, head_weight, targets), hidden)
    (divided,) = torch.autograd.grad(our_ce(hidden, head_weight, targets) / num_targets, hidden)
    ratio = divided.float().abs().sum() / whole.float().abs().sum() * num_targets
    assert ratio.item() == pytest.approx(1, abs=2e-4)


def test_a_factor_scales_loss_and_gradient() -> None:
    hidden, head_weight, targets = random_case(2, 40)
    whole = torch.autograd.grad(our_ce(hidden, head_weight, targets), (hidden, head_weight))
    scaled = torch.autograd.grad(our_ce(hidden, head_weight, targets) * 1024 / 7, (hidden, head_weight))
    for before, after in zip(whole, scaled, strict=True):
        assert torch.allclose(after, before * 1024 / 7, rtol=1e-6)


def test_float16_gradients_survive_before_the_gradient_scaler_multiplies_them() -> None:
    # of a mean over 4096 tokens most would be below float16's smallest number
    hidden, head_weight, targets = random_case(1, 64, dtype=torch.float16, masked=0.0)
    (gradient,) = torch.autograd.grad(our_ce(hidden, head_weight, targets) / 4096 * 65536, hidden)
    exact_hidden, exact_head = (tensor.detach().float().requires_grad_() for tensor in (hidden, head_weight))
    _, exact_gradient, _ = with_gradients(plain_ce, exact_hidden, exact_head, targets)
    assert (gradient.float() / 16 - exact_gradient).abs().max() < 2**-9 * exact_gradient.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scale", "soft_cap"), [(0.25, 0.0), (1.0, 3.0), (2.0, 5.0)])
def test_a_head_that_scales_and_caps_has_the_loss_and_gradients_of_its_formula(
    scale: float, soft_cap: float, dtype: torch.dtype
) -> None:
    hidden, weight, targets = random_case(2, 150, dtype=dtype)

    def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return ce_sum(hidden, Head(weight, scale, soft_cap), targets)

    def formula(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = scale * F.linear(hidden.double(), weight.double())
        if soft_cap:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    loss, *gradients = with_gradients(ours, hidden, weight, targets)
    exact, *exact_gradients = with_gradients(formula, hidden, weight, targets)
    eps = max(torch.finfo(dtype).eps, 1e-6)
    assert loss.item() == pytest.approx(exact.item(), rel=eps)
    for our, their in zip(gradients, exact_gradients, strict=True):
        assert (our - their).abs().max() <= 4 * eps * their.abs().max()


# ---- cross-entropy: what is not a target


def test_a_micro_batch_without_targets_is_zero_and_harmless() -> None:
    hidden, head_weight, targets = random_case(2, 9, masked=1.0)
    loss = our_ce(hidden, head_weight, targets)
    gradients = torch.autograd.grad(loss / 5, (hidden, head_weight))
    assert loss.item() == 0
    assert [gradient.shape for gradient in gradients] == [hidden.shape, head_weight.shape]
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("value", [0.0, 1e30, float("inf"), float("nan")])
def test_hidden_of_a_masked_position_reaches_neither_loss_nor_gradient(value: float) -> None:
    hidden, head_weight, targets = random_case(2, 200)
    expected = with_gradients(our_ce, hidden, head_weight, targets)
    masked = targets == NO_TARGET
    assert masked.any()
    assert (expected[1][masked] == 0).all()
    assert (expected[1][~masked] != 0).any(dim=-1).all()
    spoilt = hidden.detach().masked_fill(masked[..., None], value).requires_grad_()
    for before, after in zip(expected, with_gradients(our_ce, spoilt, head_weight, targets), strict=True):
        assert torch.equal(before, after)


def test_four_micro_batches_of_unequal_answers_are_one_batch_of_four_which_means_of_means_are_not() -> None:
    hidden, head_weight, targets = random_case(4, 50, masked=0.0)
    for row, answer_length in enumerate((2, 10, 45, 0)):
        targets[row, : 50 - answer_length] = NO_TARGET
    num_targets = 2 + 10 + 45
    whole = with_gradients(lambda *case: our_ce(*case) / num_targets, hidden, head_weight, targets)

    def in_four(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
        losses = [our_ce(hidden[[row]], head_weight, targets[[row]]) / num_targets for row in range(4)]
        return torch.stack(losses).sum()

    def mean_of_means(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
        counts = (targets != NO_TARGET).sum(1).clamp_min(1)
        losses = [our_ce(hidden[[row]], head_weight, targets[[row]]) / counts[row] for row in range(4)]
        return torch.stack(losses).mean()

    for one, four in zip(whole, with_gradients(in_four, hidden, head_weight, targets), strict=True):
        assert torch.allclose(one, four, rtol=1e-5, atol=1e-7)
    for one, other in zip(whole, with_gradients(mean_of_means, hidden, head_weight, targets), strict=True):
        assert not torch.allclose(one, other, rtol=0.05)


# ---- cross-entropy: memory, autocast, graph


class Recorder(TorchDispatchMode):
    """Notes every operation and the elements of the largest tensor that any of them makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else [result]
        self.operations.append(func.overloadpacket.__name__)
        self.largest = max([self.largest, *(tensor.numel() for tensor in made if isinstance(tensor, Tensor))])
        return result


def recorded(run: Callable[..., object], *case: Tensor) -> Recorder:
    recorder = Recorder()
    with recorder:
        run(*case)
    return recorder


@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_the_logits_no_more_than_a_chunk_of_bytes_is_alive(
    dtype: torch.dtype, soft_cap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk_bytes = 2**18
    monkeypatch.setattr(losses, "CHUNK_BYTES", chunk_bytes)
    hidden, weight, targets = random_case(2, 500, vocab=512, dtype=dtype, masked=0.0)
    head = Head(weight.detach(), soft_cap=soft_cap)
    live = LiveBytes()
    live.hold([hidden, weight, targets])
    inputs = live.now
    with live:
        ce_sum(hidden, head, targets)
    copies = 3 * hidden.nbytes + 24 * targets.numel()  # the rows that have a target, their gradient, places, labels
    assert chunk_bytes / 2 < live.peak - inputs < chunk_bytes + copies
    with live:
        plain_ce(hidden, head.weight, targets)
    assert live.peak - inputs > 2 * (chunk_bytes + copies)  # the whole logits would show


def test_between_forward_and_backward_no_logits_wait() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    hidden, head_weight, targets = random_case(2, 500, vocab=512, masked=0.0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        our_ce(hidden, head_weight, targets)
    assert sorted(tensor.numel() for tensor in kept if tensor.is_floating_point()) == [512 * HIDDEN, 1000 * HIDDEN]


def multiplications(*case: Tensor) -> int:
    return recorded(our_ce, *case).operations.count("mm")


def test_what_is_frozen_costs_no_work_and_leaves_the_other_gradient_as_it_is() -> None:
    hidden, head_weight, targets = random_case(2, 50)
    _, hidden_gradient, head_gradient = with_gradients(our_ce, hidden, head_weight, targets)
    with torch.no_grad():
        assert multiplications(hidden, head_weight, targets) == 1
        assert "scatter_add_" not in recorded(our_ce, hidden, head_weight, targets).operations
    assert "scatter_add_" in recorded(our_ce, hidden, head_weight, targets).operations
    assert multiplications(hidden, head_weight, targets) == 3
    assert multiplications(hidden, head_weight.detach(), targets) == 2
    assert multiplications(hidden.detach(), head_weight, targets) == 2
    (alone,) = torch.autograd.grad(our_ce(hidden, head_weight.detach(), targets), hidden)
    assert torch.equal(alone, hidden_gradient)
    (alone,) = torch.autograd.grad(our_ce(hidden.detach(), head_weight, targets), head_weight)
    assert torch.equal(alone, head_gradient)


def test_there_is_no_graph_under_no_grad() -> None:
    hidden, head_weight, targets = random_case(2, 200)
    with torch.no_grad():
        loss = our_ce(hidden, head_weight, targets)
    assert not loss.requires_grad
    assert torch.equal(loss, our_ce(hidden, head_weight, targets).detach())


AUTOCASTS = [(False, torch.bfloat16), (True, torch.bfloat16), (True, torch.float16)]


@pytest.mark.parametrize(("enabled", "cast"), AUTOCASTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_multiplies_in_the_dtype_of_a_linear_layer(
    enabled: bool, cast: torch.dtype, dtype: torch.dtype
) -> None:
    hidden, head_weight, targets = random_case(2, 200, dtype=dtype)
    with torch.autocast("cpu", cast, enabled=enabled):
        assert head_dtype(head_weight) == F.linear(hidden, head_weight).dtype
        ours = with_gradients(our_ce, hidden, head_weight, targets)
        theirs = with_gradients(plain_ce, hidden, head_weight, targets)
    assert ours[0].item() == pytest.approx(theirs[0].item(), rel=1e-6)
    assert [gradient.dtype for gradient in ours[1:]] == [dtype, dtype]
    for our, their in zip(ours[1:], theirs[1:], strict=True):
        assert (our - their).abs().max() < 2**-6 * their.abs().max()


def test_autocast_rounds_the_logits_but_never_the_sum() -> None:
    hidden, head_weight, targets = random_case(2, 200)
    exact = our_ce(hidden, head_weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = our_ce(hidden, head_weight, targets)
    assert rounded.dtype == torch.float32
    assert rounded != exact
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-3)


# ---- PET


def line(length: int, slope: float = 0.7) -> Tensor:
    return (torch.arange(float(length)) * slope + 0.3).repeat(1, 4, 1).mT


def parabola(length: int, c: float) -> Tensor:
    """h = c t^2, whose second difference is 2 c everywhere."""
    return (torch.arange(float(length)) ** 2 * c).repeat(1, 4, 1).mT


def test_pet_is_zero_on_a_line() -> None:
    assert pet_sum(line(9), None).item() == pytest.approx(0, abs=1e-10)
    assert pet_sum(torch.full((2, 9, 4), 3.0), None).item() == 0


@pytest.mark.parametrize("length", [3, 4, 9])
def test_pet_of_a_parabola_is_the_square_of_its_bend_for_every_window_of_three_whatever_the_width(length: int) -> None:
    assert pet_sum(parabola(length, 1.5), None).item() == pytest.approx((length - 2) * 9)
    assert pet_sum(parabola(length, 1.5)[..., :1], None).item() == pytest.approx((length - 2) * 9)


def test_pet_is_the_second_difference_written_out() -> None:
    h = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))
    expected = sum(
        float(((h[b, t + 2] - 2 * h[b, t + 1] + h[b, t]).double() ** 2).mean()) for b in range(3) for t in range(6)
    )
    assert pet_sum(h, None).item() == pytest.approx(expected, rel=1e-6)
    assert pet_sum(h, torch.ones(3, 8, dtype=torch.int64)).item() == pytest.approx(expected, rel=1e-6)


def test_huber_is_the_square_below_delta_and_a_straight_line_beyond() -> None:
    # bend 3: below delta 9, beyond 2 delta |bend| - delta^2
    assert pet_sum(parabola(3, 1.5), None, huber_delta=4.0).item() == pytest.approx(9)
    assert pet_sum(parabola(3, 1.5), None, huber_delta=3.0).item() == pytest.approx(9)
    assert pet_sum(parabola(3, 1.5), None, huber_delta=1.0).item() == pytest.approx(5)
    assert pet_sum(parabola(3, -1.5), None, huber_delta=1.0).item() == pytest.approx(5)
    assert pet_sum(parabola(3, 3.0), None, huber_delta=1.0).item() == pytest.approx(11)


def test_huber_agrees_with_l2_below_delta_in_value_and_gradient() -> None:
    h = (torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0)) * 0.1).requires_grad_()
    squares, huber = pet_sum(h, None), pet_sum(h, None, huber_delta=2.0)
    assert torch.equal(squares, huber)
    (of_squares,), (of_huber,) = torch.autograd.grad(squares, h), torch.autograd.grad(huber, h)
    assert torch.allclose(of_squares, of_huber, rtol=1e-6)


@pytest.mark.parametrize("huber_delta", [0.0, 0.5])
@pytest.mark.parametrize("value", [0.0, 1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("left", [False, True])
def test_pet_is_blind_to_padding_on_either_side(left: bool, value: float, huber_delta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 9, 4, generator=generator)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    if not left:
        mask = mask.flip(1)
    real = mask.bool()
    expected = pet_sum(h[:1, real[0]], None, huber_delta) + pet_sum(h[1:], None, huber_delta)
    padded = h.masked_fill(~real[..., None], value).requires_grad_()
    loss = pet_sum(padded, mask, huber_delta)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, padded)
    assert (gradient[~real] == 0).all()
    assert torch.isfinite(gradient).all()
    assert (gradient[real] != 0).any(dim=-1).all()


def test_pet_never_crosses_the_end_of_a_row() -> None:
    rows = torch.cat([parabola(6, 1.0), parabola(6, 0.5) + 1e6, line(6) - 1e6])
    singly = sum(pet_sum(row[None], None).item() for row in rows)
    assert pet_sum(rows, None).item() == pytest.approx(singly)


@pytest.mark.parametrize("length", [0, 1, 2])
def test_pet_of_fewer_than_three_tokens_is_zero(length: int) -> None:
    h = torch.randn(2, length, 4, requires_grad=True)
    mask = torch.ones(2, length, dtype=torch.int64)
    for loss in (pet_sum(h, None), pet_sum(h, mask), pet_sum(h, None, huber_delta=1.0)):
        assert loss.item() == 0
        assert (torch.autograd.grad(loss, h)[0] == 0).all()
    row_of_two = torch.tensor([[1, 1, 0, 0, 0]])
    assert pet_sum(torch.randn(1, 5, 4), row_of_two).item() == 0


@pytest.mark.parametrize("huber_delta", [0.0, 0.4])
def test_gradient_of_pet_is_that_of_finite_differences(huber_delta: float) -> None:
    h = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    # the arithmetic is float32, so the steps are wide; a square's central difference is exact all the same
    assert torch.autograd.gradcheck(lambda h: pet_sum(h, mask, huber_delta), h, eps=1e-3, atol=5e-3, rtol=1e-2)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("huber_delta", [0.0, 0.4])
def test_pet_of_bfloat16_is_computed_in_float32(huber_delta: float, autocast: bool) -> None:
    h = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = pet_sum(h, None, huber_delta)
    assert loss.dtype == torch.float32
    d = h.detach().double().diff(n=2, dim=1).abs()
    exact = d.square() if huber_delta == 0 else torch.where(d < huber_delta, d**2, huber_delta * (2 * d - huber_delta))
    assert loss.item() == pytest.approx((exact.sum() / 32).item(), rel=1e-6)
    assert torch.autograd.grad(loss, h)[0].dtype == torch.bfloat16


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([0, 12]))
def test_a_batch_counts_the_windows_that_pet_uses(lengths: list[int], padded_to: int) -> None:
    rows = []
    for length in lengths:
        marks = torch.zeros(length, dtype=torch.uint8)
        rows.append(Row(torch.ones(length, dtype=torch.int32), marks.bool(), marks, 0, False))
    batch = collate(rows, padded_to)
    every_bend_is_one = parabola(batch.input_ids.shape[1], 0.5).expand(len(rows), -1, -1)
    _, num_windows, num_tokens = batch.counts
    assert pet_sum(every_bend_is_one, batch.attention_mask).item() == pytest.approx(num_windows)
    assert num_tokens == sum(lengths)
