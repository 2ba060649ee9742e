"""Generation by a finished run or an exported model; torch and transformers are needed here."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    EosTokenCriteria,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TopPLogitsWarper,
)

from so8t.checkpoint import checkpoint_at
from so8t.config import (
    CONFIG_FILE,
    InputError,
    ModelConfig,
    ModelSpec,
    QloraConfig,
    QuantizationConfig,
    So8tConfig,
    load_config,
)
from so8t.model import causal_lm, load_model
from so8t.pretrained import load_model_config, load_tokenizer, positions_of, stops_in
from so8t.serve.thinker import Question, Written
from so8t.thinking import neutralise

END = "</final>"
LOWEST_TEMPERATURE = 1e-6  # divided by less, the logits overflow


class Generator:
    """A model in evaluation mode with its tokenizer. Calling it generates."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
        self.folder = folder
        self.model_hash = model_hash(model, tokenizer)
        self._model: Any = model
        self._tokenizer = tokenizer
        self._markers = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
        # made once: it spells out the whole vocabulary, 0.2 s for one of 49152
        self.is_at_end = StoppingCriteriaList([StopStringCriteria(tokenizer, [END])])
        if ends_of_turn := stops_in(model.generation_config):
            self.is_at_end.append(EosTokenCriteria(ends_of_turn))

    def encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation that ends with the user's turn.

        Raises InputError if it alone fills the model's context, or if the chat template refuses it.
        """
        try:
            text = self.prompt(messages)
        except TemplateError as error:
            raise InputError(f"the model's chat template does not take these messages ({error.message})") from error
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        context = positions_of(self._model.config)
        if not tokens:
            raise InputError("the model's chat template makes nothing of these messages")
        if context is not None and len(tokens) >= context:
            raise InputError(
                f"the question is {len(tokens)} tokens long with the chat markers, the model takes less than {context}"
            )
        return tokens

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Nothing in a message can pass for a tag or for a marker of the chat template."""
        harmless = [{"role": message["role"], "content": self._harmless(message["content"])} for message in messages]
        text: str = self._tokenizer.apply_chat_template(harmless, tokenize=False, add_generation_prompt=True)
        return text

    def _harmless(self, text: str) -> str:
        for marker in self._markers:
            text = text.replace(marker, f"{marker[0]} {marker[1:]}")
        return neutralise(text)

    @torch.inference_mode()
    def __call__(
        self,
        questions: Sequence[Question],
        prompts: Sequence[list[int]],
        written: Callable[[Sequence[Written]], None],
    ) -> None:
        """Generate for all questions together; `prompts` are what `encode` made of them.

        Calls `written` after every step in which some are done, with the text that the model wrote, thinking and all,
        up to `</final>`, and its number of tokens. A question is greedy at temperature 0. It ends early at its
        deadline, when its asker has gone, or where the model's context is full.
        """
        pads = self._tokenizer.pad_token_id, self._tokenizer.eos_token_id, 0
        pad = next(token for token in pads if token is not None)
        rows = [torch.tensor(prompt) for prompt in prompts]
        on_the_left: Any = {"batch_first": True, "padding_side": "left"}  # so that all rows write at the same place
        input_ids = pad_sequence(rows, padding_value=pad, **on_the_left)
        attention_mask = pad_sequence([torch.ones_like(row) for row in rows], **on_the_left)
        context = positions_of(self._model.config)
        limits = [
            question.max_new_tokens if context is None else min(question.max_new_tokens, context - len(prompt))
            for question, prompt in zip(questions, prompts, strict=True)
        ]
        ending = _Ending(self, questions, limits, input_ids.shape[1], written)
        sampling: dict[str, Any] = {"do_sample": False}
        if any(question.temperature > LOWEST_TEMPERATURE for question in questions):
            sampling = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
            sampling["logits_processor"] = LogitsProcessorList([_EachItsOwn(questions)])
        output = self._model.generate(
            input_ids=input_ids.to(self._model.device),
            attention_mask=attention_mask.to(self._model.device),
            **sampling,
            max_new_tokens=max(limits),
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([ending]),
        )
        ending.finish([row for row in range(len(prompts)) if not ending.is_done[row]], output, [False] * len(prompts))

    def decode(self, tokens: Tensor) -> str:
        before, end, _ = self._tokenizer.decode(tokens, skip_special_tokens=True).partition(END)
        return f"{before}{end}"  # the last token may reach beyond it


class _EachItsOwn(LogitsProcessor):
    """Each row has its own temperature and top_p."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self._questions = questions

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        rows: list[Any] = list(scores.split(1))
        for index, question in enumerate(self._questions):
            if question.temperature > LOWEST_TEMPERATURE:
                drawn_by = rows[index] / question.temperature
                rows[index] = TopPLogitsWarper(question.top_p)(drawn_by, drawn_by)
            else:
                likeliest = rows[index].argmax(dim=1, keepdim=True)
                rows[index] = torch.full_like(rows[index], -torch.inf).scatter(1, likeliest, 0.0)
        return torch.cat(rows)


class _Ending(StoppingCriteria):
    """Decides after every token which rows are done, and hands each over at once."""

    def __init__(
        self,
        generator: Generator,
        questions: Sequence[Question],
        limits: Sequence[int],
        width: int,
        written: Callable[[Sequence[Written]], None],
    ) -> None:
        self.is_done = [False] * len(questions)
        self._generator = generator
        self._questions = questions
        self._limits = limits
        self._width = width
        self._written = written

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        now, num_tokens = time.monotonic(), input_ids.shape[1] - self._width
        ended = self._generator.is_at_end(input_ids, scores).tolist()
        done = []
        for row, question in enumerate(self._questions):
            is_over = num_tokens >= self._limits[row] or now >= question.deadline or question.gone.is_set()
            if not self.is_done[row] and (ended[row] or is_over):
                done.append(row)
        self.finish(done, input_ids, ended)
        return torch.tensor(self.is_done, device=input_ids.device)

    def finish(self, rows: Sequence[int], input_ids: Tensor, ended: Sequence[bool]) -> None:
        if not rows:
            return
        for row in rows:
            self.is_done[row] = True
        tokens = input_ids[:, self._width :]
        texts = {row: self._generator.decode(tokens[row]) for row in rows}
        self._written([Written(row, text, tokens.shape[1], ended[row]) for row, text in texts.items()])


def load_generator(path: Path) -> Generator:
    """Load an ordinary Hugging Face folder, or the newest checkpoint of a run, or the checkpoint that `path` is.

    On the GPU if there is one. Raises InputError if `path` is none of them or cannot be loaded.
    """
    checkpoint = checkpoint_at(path)
    folder = checkpoint or path
    if checkpoint:
        spec = load_config(checkpoint / CONFIG_FILE).model_spec
    elif (path / "config.json").is_file():
        stored: Any = load_model_config(ModelConfig(str(path))).dtype or torch.float32
        dtype: Any = str(stored).removeprefix("torch.")
        attention: Any = None  # as transformers chooses: some families have eager only
        plain = ModelConfig(str(path), dtype=dtype, attn_implementation=attention)
        spec = ModelSpec(plain, QuantizationConfig(), QloraConfig(enabled=False), So8tConfig(enabled=False))
    else:
        raise InputError(f"{path} is neither a run with a checkpoint nor a model folder with a config.json")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = causal_lm(load_model(spec, device, seed=0, checkpoint=checkpoint)).eval()
    tokenizer = load_tokenizer(replace(spec.model, base_model=str(folder)), model.config.vocab_size)
    if tokenizer.chat_template is None:
        raise InputError(f"the tokenizer of {folder} has no chat template; put one there as chat_template.jinja")
    return Generator(model, tokenizer, folder)


def model_hash(model: PreTrainedModel, tokenizer: Any) -> str:
    """SHA-256 of all that decides what is answered: weights as loaded, configs, tokenizer, chat template."""
    configs = model.config.to_json_string(), model.generation_config.to_json_string()
    texts = *configs, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template
    digest = hashlib.sha256("\0".join(texts).encode())
    for name, module in model.named_modules():
        digest.update(f"{name} {getattr(module, 'scaling', None)}".encode())  # of adapters: it is no tensor
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
