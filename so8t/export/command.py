"""A finished run as an ordinary Hugging Face folder: LoRA merged, gates baked in, checked against the live model.

    python -m so8t.export runs/default exported/default
    python -m so8t.export runs/smollm2/checkpoints/step_000020 exported/smollm2 --dtype fp32

The live model is the unquantized base with LoRA and gates beside it. It is merged in place, written shard by shard, and
the folder is loaded again for the check. Memory holds one model in `model.dtype` (on the GPU if there is one) and, in
float32, one matrix and the heads of the models that were compared; the host holds one shard of 2 GB.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from so8t import cli


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser("python -m so8t.export", __doc__)
    parser.add_argument("run", type=Path, help="a run's training.output_dir (its newest checkpoint) or a checkpoint")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the exported weights (default: bf16)"
    )
    options = parser.parse_args(arguments)

    return cli.run("so8t.export", lambda: _export(options))


def _export(options: argparse.Namespace) -> int:
    import torch  # here, because it takes seconds that --help need not wait for

    from so8t.export.merge import ExportError, export

    try:
        export(options.run, options.out, options.dtype)
    except (ExportError, OSError) as error:
        raise OSError(f"{options.out} was not written: {error}") from error
    except torch.OutOfMemoryError as error:
        raise OSError(
            f"{options.out} was not written: the GPU has no room for the model in its training dtype; "
            'set CUDA_VISIBLE_DEVICES="" to export on the CPU'
        ) from error
    cli.say(f"exported: {options.out}")
    return 0
