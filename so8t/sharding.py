"""A frozen base in parts: each rank holds its share of every decoder layer, and gathers a layer while it computes.

torch's FSDP2 does it (`fully_shard`). Embeddings, head, norms outside the layers, and all that is trained, are whole on
every rank, so checkpoints, the sum of gradients and the optimizer are as without it.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from so8t.model import checkpointable_layers, trainable_parameters

GATHERED = 2  # layers at a time: one computes while the next arrives


def shard_layers(model: PreTrainedModel, device: torch.device) -> None:
    """Move `model` to the device of this rank, a layer at a time, and keep this rank's share of what is frozen there.

    From now on all ranks must go through the model equally often, because each pass gathers from all of them.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    shared = set()
    for layer in checkpointable_layers(model):
        move(layer, device)
        fully_shard(layer, mesh=mesh, ignored_params=set(trainable_parameters(layer)))
        shared |= set(layer.parameters())
    nn.Module.to(model, device)
    # the root, which lets go of the layers after a backward pass, has nothing of its own to share
    fully_shard(model.base_model, mesh=mesh, ignored_params=set(model.parameters()) - shared)


def move(layer: nn.Module, device: torch.device) -> None:
    """Move a layer to a device, 4-bit weights too, which bitsandbytes 0.50 does not let `Module.to` move."""
    for module in layer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if type(parameter) is not nn.Parameter:  # a 4-bit weight, which takes its scales along
                setattr(module, name, parameter.to(device))
    layer.to(device)


def frozen(layer: nn.Module) -> list[Tensor]:
    """What is shared out of a layer."""
    return [parameter.data for parameter in layer.parameters() if not parameter.requires_grad]


def held_here(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor, or all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
