"""Generation by a finished run or an exported model, one request at a time; torch and transformers are needed here."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteriaList, StopStringCriteria

from so8t.checkpoint import STATE_FILE, checkpoint_folders
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
from so8t.model import GATES_FILE, causal_lm, load_model, load_model_config, load_tokenizer
from so8t.thinking import neutralise

END = "</final>"


class Generator:
    """A model in evaluation mode with its tokenizer. Calling it generates."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
        self.folder = folder
        self.model_hash = model_hash(model, tokenizer)
        self._model: Any = model
        self._tokenizer = tokenizer
        self._markers = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
        # made once: it spells out the whole vocabulary, 0.2 s for one of 49152
        self._stopping = StoppingCriteriaList([StopStringCriteria(tokenizer, [END])])

    @torch.inference_mode()
    def __call__(
        self, query: str, *, max_new_tokens: int, temperature: float, top_p: float, max_seconds: float
    ) -> tuple[str, int]:
        """The text that the model writes to `query`, thinking and all, up to `</final>`, and its number of tokens.

        Greedy at temperature 0. Ends early after `max_seconds` or where the model's context is full. Raises InputError
        if the query alone fills it.
        """
        encoding = self._tokenizer(self.prompt(query), add_special_tokens=False, verbose=False, return_tensors="pt")
        prompt = encoding.to(self._model.device)
        length, context = prompt["input_ids"].shape[1], self._model.config.max_position_embeddings
        if length >= context:
            raise InputError(
                f"query is {length} tokens long with the chat markers, the model takes less than {context}"
            )
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 1e-6:  # divided by less, the logits are no numbers any more
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        output = self._model.generate(
            **prompt,
            **sampling,
            max_new_tokens=min(max_new_tokens, context - length),
            max_time=max_seconds,
            stopping_criteria=self._stopping,
        )
        tokens = output[0, length:]
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        before, end, _ = text.partition(END)  # the last token may reach beyond it
        return before + end, len(tokens)

    def prompt(self, query: str) -> str:
        """The query as the user's turn. Nothing in it can pass for a tag or for a marker of the chat template."""
        for marker in self._markers:
            query = query.replace(marker, f"{marker[0]} {marker[1:]}")
        messages = [{"role": "user", "content": neutralise(query)}]
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text


def load_generator(path: Path) -> Generator:
    """Load an ordinary Hugging Face folder, or the newest checkpoint of a run, or the checkpoint that `path` is.

    On the GPU if there is one. Raises InputError if `path` is none of them or cannot be loaded.
    """
    checkpoints = checkpoint_folders(path)
    if not checkpoints and any((path / name).is_file() for name in (STATE_FILE, GATES_FILE)):
        checkpoints = [path]  # its config.json alone would load without the gates
    if checkpoints:
        folder = checkpoints[-1]
        config = load_config(folder / CONFIG_FILE)
        spec = config.model_spec
    elif (path / "config.json").is_file():
        folder = path
        stored: Any = load_model_config(ModelConfig(str(path))).dtype or torch.float32
        plain = ModelConfig(str(path), dtype=str(stored).removeprefix("torch."))  # type: ignore[arg-type]
        spec = ModelSpec(plain, QuantizationConfig(), QloraConfig(enabled=False), So8tConfig(enabled=False))
    else:
        raise InputError(f"{path} is neither a run with a checkpoint nor a model folder with a config.json")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = causal_lm(load_model(spec, device, seed=0, checkpoint=folder if checkpoints else None)).eval()
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
