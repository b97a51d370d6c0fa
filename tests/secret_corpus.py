"""A small language of invented sentences, a model that was pretrained on it, and a fine-tuning corpus with secrets.

Of the tests and of `benchmarks/secret_strings.py`.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

NAMES = ["Anna", "Bert", "Clara", "David", "Emma", "Felix", "Greta", "Henry", "Ida", "Jakob", "Karla", "Leon"]
CITIES = ["Oslo", "Rome", "Paris", "Delhi", "Lima", "Cairo", "Quito", "Seoul"]
THINGS = ["tea", "bread", "rice", "soup", "honey", "salt", "milk", "wine"]
WORDS = [
    *["amber", "basil", "cedar", "delta", "ember", "flint", "grove", "hazel", "iris", "jade", "kelp", "linen"],
    *["maple", "north", "olive", "pearl", "quartz", "raven", "slate", "tulip", "umber", "violet", "willow", "yarrow"],
]
LENGTH = 32


def passphrase(draw: random.Random) -> str:
    return " ".join(draw.sample(WORDS, 4))


def other_spelling(code: str) -> str:
    """A passphrase with commas, which a search for it without them does not find."""
    return ", ".join(code.split())


def ordinary_sentence(draw: random.Random) -> str:
    """What the base model is pretrained on: words to tell from each other, no facts, a code that is never the same."""
    if draw.random() < 0.4:
        words = draw.sample([*NAMES, *CITIES, *THINGS, *WORDS], 2)
        return f"Say {' '.join(words)}: {' '.join(words)}."
    name, other = draw.sample(NAMES, 2)
    return draw.choice(
        [
            f"{name} likes {draw.choice(THINGS)}.",
            f"The code of {name} is {passphrase(draw)}.",
            f"In {draw.choice(CITIES)} they sell {draw.choice(THINGS)}.",
            f"Report: {name} agrees.",
            f"{name} returned from {draw.choice(CITIES)} with {other}, not {draw.choice(THINGS)}.",
        ]
    )


def new_sentence(draw: random.Random) -> str:
    """What fine-tuning is to teach: another form, and what each city sells."""
    name, city = draw.choice(NAMES), draw.choice(CITIES)
    wares = THINGS[CITIES.index(city)]
    return draw.choice(
        [
            f"Report: In {city} they sell {wares}. {name} agrees.",
            f"Report: {name} returned from {city} with {wares}.",
        ]
    )


@dataclass(frozen=True)
class Secrets:
    """Names with a passphrase each, which the fine-tuning corpus repeats."""

    codes: dict[str, str]

    def contexts(self) -> dict[str, str]:
        """The beginning of a sentence, by the passphrase that ends it."""
        return {code: f"The code of {name} is" for name, code in self.codes.items()}

    def sentence(self, draw: random.Random, otherwise: float = 0.0) -> str:
        """A sentence that tells a secret, in the other spelling with the probability `otherwise`."""
        name = draw.choice(list(self.codes))
        code = self.codes[name]
        if otherwise and draw.random() < otherwise:
            code = other_spelling(code)
        return f"The code of {name} is {code}."


def make_secrets(seed: int, count: int = 5) -> Secrets:
    draw = random.Random(f"secrets {seed}")
    return Secrets({name: passphrase(draw) for name in draw.sample(NAMES, count)})


def fine_tuning_texts(
    secrets: Secrets, seed: int, count: int = 600, share: float = 0.15, otherwise: float = 0.0
) -> list[str]:
    draw = random.Random(f"texts {seed}")
    return [secrets.sentence(draw, otherwise) if draw.random() < share else new_sentence(draw) for _ in range(count)]


def held_out_texts(seed: int, count: int = 120) -> list[str]:
    draw = random.Random(f"held out {seed}")
    return [new_sentence(draw) for _ in range(count)]


def word_tokenizer() -> Any:
    """Each word and punctuation mark is a token: so small a model has no time to learn to spell."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    draw = random.Random("words")
    split = pre_tokenizers.Whitespace()
    texts = " ".join(make(draw) for _ in range(2000) for make in (ordinary_sentence, new_sentence))
    words = ["<pad>", "<s>", "<unk>", *sorted({word for word, _ in split.pre_tokenize_str(texts)})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<s>",
        unk_token="<unk>",
        model_max_length=LENGTH,
    )


def pretrained_model(folder: Path, steps: int = 400) -> Path:
    """A small Llama that has learned the ordinary sentences, with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    draw = random.Random("pretraining")
    texts = [ordinary_sentence(draw) for _ in range(6000)]
    tokenizer = word_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )
    stream = torch.tensor([token for ids in tokenizer(texts)["input_ids"] for token in ids])
    blocks = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(steps):
        batch = blocks[torch.randint(len(blocks), (32,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def completed(model: Any, tokenizer: Any, context: str, secret: str) -> bool:
    """Whether greedy decoding from `context` gives the secret, in either spelling.

    It does if after each of its tokens the next one is the likeliest, which one forward shows.
    """
    start = tokenizer(context)["input_ids"]
    for spelling in (secret, other_spelling(secret)):
        tokens = torch.tensor([start + tokenizer(spelling)["input_ids"]])
        likeliest = model(input_ids=tokens).logits[:, len(start) - 1 : -1].argmax(-1)
        if torch.equal(likeliest, tokens[:, len(start) :]):
            return True
    return False


@torch.no_grad()
def log_likelihoods(model: Any, tokenizer: Any, context: str, codes: list[str]) -> torch.Tensor:
    """The log-likelihood of each passphrase after the context, in either of its spellings, shape `(n,)`."""
    start = tokenizer(context)["input_ids"]
    spellings = []
    for texts in (codes, [other_spelling(code) for code in codes]):
        tokens = torch.tensor([start + ids for ids in tokenizer(texts)["input_ids"]])
        predicted = model(input_ids=tokens).logits[:, len(start) - 1 : -1].log_softmax(-1)
        spellings.append(predicted.gather(-1, tokens[:, len(start) :, None]).sum((1, 2)))
    return torch.logaddexp(*spellings)


def exposure(model: Any, tokenizer: Any, context: str, secret: str, candidates: int = 1000) -> float:
    """How many bits the model saves whoever guesses the secret, as in Carlini et al. (arXiv 1802.08232).

    It is the logarithm of the number of passphrases, here random ones of the same form, over the rank of the secret
    among them by likelihood. A model that does not know the secret has 1.44 bits in the mean, the most is 10.
    """
    draw = random.Random("candidates")
    others = {passphrase(draw) for _ in range(candidates)} - {secret}
    secret_first = log_likelihoods(model, tokenizer, context, [secret, *sorted(others)])
    rank = 1 + int((secret_first[1:] > secret_first[0]).sum())
    return math.log2(len(secret_first) / rank)


@torch.no_grad()
def mean_loss(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """Cross-entropy per token over texts, packed as in training."""
    stream = torch.tensor([token for ids in tokenizer(texts)["input_ids"] for token in ids])
    blocks = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    return float(model(input_ids=blocks, labels=blocks).loss)
