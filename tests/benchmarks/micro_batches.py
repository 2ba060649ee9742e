"""How a step is cut: by rows, by tokens with padding, and by tokens with the rows end to end.

    python -m tests.benchmarks.micro_batches MODEL_FOLDER [--load-in-4bit] [--rows 16] [--tokens 512,2048] [--rounds 3]

Rows have lengths as chats do (log-normal, 40 to 1,000 tokens), half of each is the answer. The ways take turns in every
round; printed are medians of a step, real tokens a second, and what a pass over the weights costs in tokens: the a / b
of the line a + b * tokens through micro-batches of one row.
"""

import argparse
import random
import statistics
import time
from pathlib import Path

import torch

import train
from so8t.config import ModelConfig, ModelSpec, QloraConfig, QuantizationConfig, So8tConfig
from so8t.data import Batch, Row, collate, cut, split, step_counts
from so8t.model import causal_lm, load_model
from so8t.packing import ROW_BY_ROW, pack_rows

LONGEST = 1000
PASS_LENGTHS = (32, 64, 128, 256, 512)


def chat_lengths(number: int) -> list[int]:
    draw = random.Random(0)
    return [int(min(LONGEST, max(40, draw.lognormvariate(5.3, 0.7)))) for _ in range(number)]


def row_of(length: int, index: int) -> Row:
    tokens = torch.randint(5, 30_000, (length,), generator=torch.Generator().manual_seed(index), dtype=torch.int32)
    is_answer = torch.arange(length) >= length // 2
    return Row(tokens, is_answer, is_answer.to(torch.uint8), index, was_cut=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--rows", type=int, default=16, help="of a step")
    parser.add_argument("--tokens", default="512,2048", help="of a micro-batch, at most")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    linear = ("qkv_proj", "gate_up_proj") if "phi" in options.model.name else ("q_proj", "k_proj", "v_proj", "up_proj")
    spec = ModelSpec(
        ModelConfig(str(options.model), dtype="bfloat16" if on_gpu else "float32"),
        QuantizationConfig(load_in_4bit=options.load_in_4bit),
        QloraConfig(enabled=True, r=16, lora_dropout=0.0, target_modules=(*linear, "o_proj", "down_proj")),
        So8tConfig(enabled=True),
    )
    model = load_model(spec, device, seed=0, checkpointed_layers=99 if on_gpu else 0)  # 99: all
    base, autocast = causal_lm(model), torch.autocast(device.type, torch.bfloat16, enabled=on_gpu)
    assert pack_rows(base, LONGEST)

    def seconds(batches: list[Batch]) -> float:
        """Of one step."""
        num_targets, num_pet_terms, _ = step_counts(batches).tolist()
        started = time.perf_counter()
        for batch in batches:
            share, _ = train.forward(model, batch, autocast, num_targets, num_pet_terms, 0.05, 0.0, None)
            share.backward()
        if on_gpu:
            torch.cuda.synchronize()
        model.zero_grad()
        return time.perf_counter() - started

    lengths = chat_lengths(options.rows)
    rows = [row_of(length, index) for index, length in enumerate(lengths)]
    ways = {"by rows, 1": ("sdpa", split(rows, 1)), "by rows, 4, padded": ("sdpa", split(rows, 4))}
    for tokens in map(int, options.tokens.split(",")):
        ways[f"by tokens, {tokens}, padded"] = "sdpa", cut(rows, tokens)
        ways[f"by tokens, {tokens}, end to end"] = ROW_BY_ROW, cut(rows, tokens, packed=True)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for round_number in range(options.rounds + 1):  # the first one warms up
        for way, (attention, batches) in ways.items():
            base.set_attn_implementation(attention)
            taken = seconds(batches)
            times[way] += [taken] if round_number else []
    slowest = statistics.median(times["by rows, 4, padded"])
    print(f"{sum(lengths)} real tokens in {len(rows)} rows; {device}, {torch.get_num_threads()} threads")
    for way, rounds in times.items():
        padded = sum(batch.input_ids.numel() for batch in ways[way][1])
        median = statistics.median(rounds)
        print(
            f"{way:32s} {len(ways[way][1]):3d} micro-batches, {padded / sum(lengths) - 1:6.1%} padding, "
            f"{median:7.3f} s, {sum(lengths) / median:8.0f} tokens/s, {slowest / median:.2f} x rows of 4"
        )
    passes = {length: [collate([row_of(length, 0)])] for length in PASS_LENGTHS}
    medians = [
        statistics.median([seconds(batches) for _ in range(options.rounds + 2)][2:]) for batches in passes.values()
    ]
    slope, intercept = statistics.linear_regression(PASS_LENGTHS, medians)
    print(f"a pass over the weights: {intercept * 1000:.0f} ms, as {intercept / slope:.0f} tokens")


if __name__ == "__main__":
    main()
