"""SO(8) gates: a learned rotation, in blocks of eight, of what goes into an attention layer's `o_proj`.

A gate turns `W_o x` into `W_o (R x)` with `R = blockdiag(exp(A_1), exp(A_2), ...)` and every A_j an 8x8 skew
matrix (28 free numbers, the angles). R is orthogonal by construction, is the identity at zero angles, and is
linear, so a trained gate can be multiplied into the weight: `bake`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from so8t.config import InputError
from so8t.files import atomic_write

BLOCK_SIZE = 8
ANGLES_PER_BLOCK = 28  # the entries of an 8x8 matrix above its diagonal

# 15 small products reach the rounding of float32 (orthogonal to 2e-6) and of float64 (1e-14) up to |A| = 16
TAYLOR_DEGREE = 8
SQUARINGS = 8


def rotation(angles: Tensor) -> Tensor:
    """The rotation exp(A) of every block, in float32 (float64 if `angles` is), whatever autocast says.

    angles: [num_blocks, 28], radians: the entries of the skew matrix A above its diagonal, row by row.
    Returns [num_blocks, 8, 8], exactly the identity where all angles are zero. Differentiable.

    Scaling and squaring with a Taylor polynomial (Moler & Van Loan 2003, "Nineteen dubious ways to compute
    the exponential of a matrix", method 3), carried out on X = exp(A) - I: exp(2A) - I = X^2 + 2X.
    `torch.linalg.matrix_exp` would wait for the GPU in every call, to choose its degree on the CPU.
    """
    with _no_autocast(angles):
        scaled: Tensor = _skew(angles if angles.dtype == torch.float64 else angles.float()) / 2**SQUARINGS
        x: Tensor = scaled / TAYLOR_DEGREE
        for k in range(TAYLOR_DEGREE - 1, 0, -1):  # Horner: x = scaled / k (I + x)
            x = torch.baddbmm(scaled, scaled, x, beta=1 / k, alpha=1 / k)
        for _ in range(SQUARINGS):  # I + X squared would err 7 times more at |A| = 16 and 600 times at 0.3
            x = torch.baddbmm(x, x, x, beta=2)
        return x + torch.eye(BLOCK_SIZE, dtype=x.dtype, device=x.device)


def largest_angle(angles: Tensor) -> Tensor:
    """The largest angle, in radians, by which any block turns any plane (0-dim): the spectral norm of A.

    It is the generator's norm, so it may exceed pi. Waits for the GPU: do not call it in the training loop.
    """
    norms: Tensor = torch.linalg.matrix_norm(_skew(angles.float()), ord=2)
    return norms.amax()


def bake(o_proj_weight: Tensor, angles: Tensor) -> Tensor:
    """W_o R: the weight that alone computes what the gate and `o_proj` compute together.

    o_proj_weight: [out_features, num_blocks * 8], angles: [num_blocks, 28]. Computed in float32, then cast
    once to the weight's dtype.
    """
    with torch.no_grad(), _no_autocast(angles):
        blocks = o_proj_weight.float().reshape(len(o_proj_weight), -1, BLOCK_SIZE)
        baked = torch.einsum("obi,bij->obj", blocks, rotation(angles.float()))
        return baked.flatten(-2).to(o_proj_weight.dtype)


class SO8Gate(nn.Module):
    """Rotates its input in blocks of eight.

    The angles start as `init_scale` (radians) times standard normal numbers from `generator`, a CPU one, so
    that the start is the same on every device; `init_scale = 0` starts as the identity.
    """

    def __init__(self, num_blocks: int, init_scale: float, generator: torch.Generator) -> None:
        super().__init__()
        normal = torch.randn(num_blocks, ANGLES_PER_BLOCK, generator=generator, dtype=torch.float32)
        self.angles = nn.Parameter(init_scale * normal)

    def forward(self, x: Tensor) -> Tensor:
        """[..., num_blocks * 8] -> the same shape and dtype."""
        # x keeps its dtype: autograd then holds x itself for the backward pass, not a float32 copy of it
        with _no_autocast(x):
            turn = rotation(self.angles).to(x.dtype)
            blocks = x.reshape(-1, len(turn), BLOCK_SIZE).transpose(0, 1)  # [num_blocks, tokens, 8], a view
            return torch.bmm(blocks, turn.mT).transpose(0, 1).reshape(x.shape)

    # a bound method, not a closure: a deep copy of the model then calls the copied gate
    def rotate_input(self, o_proj: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The forward pre-hook of `o_proj`."""
        return (self(args[0]), *args[1:])


def attach_gates(model: nn.Module, layer_indices: Sequence[int], init_scale: float, seed: int) -> dict[int, SO8Gate]:
    """Put a gate in front of `o_proj` in the chosen layers (an empty list: all) and return them by layer.

    The gate becomes `so8_gate` of the attention module; no other name changes. Attach after LoRA, so that
    base weight and LoRA both see the rotated input: then LoRA can be merged first and the gate baked second.

    Raises InputError if the model has no `o_proj`, a layer does not exist, or a width is not divisible by 8.
    """
    attentions = _attentions(model)
    if not attentions:
        raise InputError(
            f"so8t.enabled needs attention layers with an `o_proj`, but {type(model).__name__} has none; "
            "set it to false or choose another model.base_model"
        )
    for index in layer_indices:
        if not 0 <= index < len(attentions):
            raise InputError(
                f"so8t.layer_indices names layer {index}, but the model has {len(attentions)} layers; "
                f"write numbers from 0 to {len(attentions) - 1}"
            )

    generator = torch.Generator().manual_seed(seed)
    gates = {}
    for index in sorted(layer_indices) or range(len(attentions)):
        o_proj = attentions[index].get_submodule("o_proj")
        width: int = o_proj.in_features  # type: ignore[assignment]
        if width % BLOCK_SIZE:
            raise InputError(
                f"so8t.enabled needs widths divisible by {BLOCK_SIZE}, but `o_proj` of layer {index} takes "
                f"{width} numbers; set it to false or choose another model.base_model"
            )
        weight: Tensor = o_proj.weight  # type: ignore[assignment]
        gate = SO8Gate(width // BLOCK_SIZE, init_scale, generator).to(weight.device)
        attentions[index].add_module("so8_gate", gate)
        o_proj.register_forward_pre_hook(gate.rotate_input)
        gates[index] = gate
    return gates


def gates_by_projection(model: nn.Module) -> dict[nn.Module, SO8Gate]:
    """The gates attached to `model`, by the `o_proj` whose input each rotates."""
    attentions = _attentions(model)
    return {attentions[layer].get_submodule("o_proj"): gate for layer, gate in gates_of(model).items()}


def gates_of(model: nn.Module) -> dict[int, SO8Gate]:
    """The gates attached to `model`, by layer."""
    gates = {index: getattr(attention, "so8_gate", None) for index, attention in enumerate(_attentions(model))}
    return {index: gate for index, gate in gates.items() if isinstance(gate, SO8Gate)}


def state_without_gates(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the model has without its gates."""
    return {name: tensor for name, tensor in model.state_dict().items() if "so8_gate" not in name}


def orthogonality_error(model: nn.Module) -> Tensor:
    """The largest |R R^T - I| over all gates of `model` (0-dim, no wait for the GPU); 0 if there are none."""
    gates = gates_of(model)
    if not gates:
        return torch.zeros((), device=next(model.parameters()).device)
    with torch.no_grad():
        turn = rotation(torch.cat([gate.angles for gate in gates.values()]))
        with _no_autocast(turn):
            identity = torch.eye(BLOCK_SIZE, device=turn.device)
            return (turn @ turn.mT - identity).abs().amax()


def save_gates(model: nn.Module, path: Path) -> None:
    """Write all angles to a safetensors file: tensors `layers.{i}.angles`, each [num_blocks, 28]."""
    tensors = {_tensor_name(i): gate.angles.detach().contiguous() for i, gate in gates_of(model).items()}
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(tensors))


def load_gates(model: nn.Module, path: Path) -> None:
    """Read the angles of all gates attached to `model` from a file that `save_gates` wrote.

    Raises InputError if it is not such a file, or if its layers or shapes differ from the model's.
    """
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as a gates file ({error})") from error

    angles = {_tensor_name(i): gate.angles for i, gate in gates_of(model).items()}
    if tensors.keys() != angles.keys():
        raise InputError(
            f"{path}: holds {_listed(tensors)}, but the model's gates are {_listed(angles)}; "
            "set so8t.layer_indices to the layers in the file"
        )
    for name, parameter in angles.items():
        if tensors[name].shape != parameter.shape:
            raise InputError(
                f"{path}: {name} has shape {list(tensors[name].shape)}, the model needs "
                f"{list(parameter.shape)}; use the model.base_model that the file was trained with"
            )
    with torch.no_grad():
        for name, parameter in angles.items():
            parameter.copy_(tensors[name])


def _skew(angles: Tensor) -> Tensor:
    """[num_blocks, 28] -> [num_blocks, 8, 8], the angles above the diagonal and their negatives below."""
    rows, columns = torch.triu_indices(BLOCK_SIZE, BLOCK_SIZE, offset=1, device=angles.device)
    upper = angles.new_zeros(len(angles), BLOCK_SIZE, BLOCK_SIZE)
    upper[:, rows, columns] = angles
    return upper - upper.mT


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def _attentions(model: nn.Module) -> list[nn.Module]:
    """The modules with a child named `o_proj`, in model order: the position is the layer's number."""
    return [m for m in model.modules() if any(name == "o_proj" for name, _ in m.named_children())]


def _tensor_name(layer: int) -> str:
    return f"layers.{layer}.angles"


def _listed(tensors: dict[str, Tensor] | dict[str, nn.Parameter]) -> str:
    return ", ".join(tensors) or "no tensors"
