"""The tokenizer of the embedded pair: a small byte-level BPE, so that any text can be encoded."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 1024
"""Tokens at most; the 256 bytes and the special tokens are among them."""

PAD, SYSTEM, USER, ASSISTANT, END = "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

_PIECES = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]|\s"


def build(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer trained on `texts`: letters, single digits and signs are split before merging.

    It has no beginning-of-text token; the chat template closes every message with `<|end|>`.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        show_progress=False,
        special_tokens=[PAD, SYSTEM, USER, ASSISTANT, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def chat(prompt: str) -> str:
    """The text the model continues with its answer to `prompt`; equal to what the chat template gives."""
    return f"{USER}{prompt}{END}{ASSISTANT}"


def save(tokenizer: PreTrainedTokenizerFast, into: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into the folder `into`."""
    tokenizer.save_pretrained(into)
