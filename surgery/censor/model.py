"""An encoder under two linear heads without bias, one for the desired task and one for the harmful.

Any module serves as encoder whose call gives one vector for each row. BERT-tiny has the shape of the paper's encoder
(`google/bert_uncased_L-2_H-128_A-2`) with random weights; its attention is the plain one, as kernels of fused
attention have no second derivative.
"""

from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from surgery.train.seeding import seeded


class TwoTasks(nn.Module):
    """An encoder with its heads; without `harmful` it is what would be published.

    Attributes:
        encoder: Gives a vector for each row.
        desired: Head of the desired task.
        harmful: Head that the simulated attacker begins with.
    """

    def __init__(self, encoder: nn.Module, width: int, desired: int, harmful: int, *, seed: int = 0) -> None:
        """Heads are drawn from the seed.

        Args:
            encoder: The encoder, kept and not copied.
            width: Entries of its vectors.
            desired: Classes of the desired task.
            harmful: Classes of the harmful task.
            seed: Of the heads.
        """
        super().__init__()
        self.encoder = encoder
        like = next(encoder.parameters())
        source = torch.Generator().manual_seed(seeded(seed, "heads"))
        self.desired = nn.Parameter(head(width, desired, source).to(like))
        self.harmful = nn.Parameter(head(width, harmful, source).to(like))

    def forward(self, inputs: Shaped[Tensor, "rows ..."]) -> Float[Tensor, "rows classes"]:
        """Logits of the desired task."""
        return self.encoder(inputs) @ self.desired.T


def head(width: int, classes: int, source: torch.Generator) -> Float[Tensor, "classes width"]:
    """A new head, uniform up to `1 / sqrt(width)` either way."""
    return (2 * torch.rand(classes, width, generator=source) - 1) / width**0.5


def mlp(inputs: int = 25, width: int = 50, depth: int = 4, *, seed: int = 0) -> nn.Sequential:
    """The encoder of the toy: `depth` linear layers with ReLU after each, drawn from the seed."""
    source = torch.Generator().manual_seed(seeded(seed, "mlp"))
    layers: list[nn.Module] = []
    for before, after in pairwise([inputs, *[width] * depth]):
        linear = nn.utils.skip_init(nn.Linear, before, after)
        for weight in linear.parameters():
            nn.init.uniform_(weight, -(before**-0.5), before**-0.5, generator=source)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers)


class _Bert(nn.Module):
    """What BERT's pooler gives, for rows of tokens that are padded by 0."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, tokens: Int[Tensor, "rows length"]) -> Float[Tensor, "rows width"]:
        found: Any = self.bert(input_ids=tokens, attention_mask=(tokens != 0).long())
        return found.pooler_output


def bert_tiny(
    vocabulary: int = 30_522, length: int = 512, *, dropout: float = 0.1, seed: int = 0
) -> nn.Module:
    """An encoder of 2 layers, width 128, 2 heads, drawn from the seed; its vectors are the pooler's.

    Args:
        vocabulary: Number of tokens; 0 is padding.
        length: Most tokens of a row.
        dropout: Of hidden states and attention.
        seed: Of the weights.
    """
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        max_position_embeddings=length,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded(seed, "bert"))
        return _Bert(BertModel(config))
