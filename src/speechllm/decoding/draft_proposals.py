"""Choice of the number of draft tokens to propose, from acceptance rates and the cost of a pass.

A forward pass mostly reads the weights, so a proposed token costs little, and saves a pass if it is
right. The rates start from those of earlier utterances and soon reflect the utterance itself.
"""

from dataclasses import dataclass, field

from torch import nn

CPU_FORWARD_COST = 64  # tokens: measured in float32 for LLMs of 0.5B
# At 75% of 790 TFLOP/s and 80% of 4.8 TB/s, an H200 computes 154 tokens while reading the weights.
GPU_READ_COST, GPU_FLOPS = 154, 590e12
GPU_LAYER_LAUNCH = 30 * 4e-6  # s: launches of a layer's kernels


def forward_cost(llm: nn.Module) -> int:
    """Return the fixed cost of a forward pass, as the number of tokens computable in that time.

    On a GPU, that is the time to read the weights and launch the kernels; a token takes 2 FLOPs per
    parameter.
    """
    if llm.device.type == "cpu":
        return CPU_FORWARD_COST
    launches = GPU_LAYER_LAUNCH * llm.config.num_hidden_layers
    return GPU_READ_COST + round(launches * GPU_FLOPS / (2 * llm.num_parameters()))


# Weight of earlier utterances, in predictions; small, so that an utterance's own tokens dominate.
PRIOR_WEIGHT = {True: 2.0, False: 0.75}


class AcceptanceRates:
    """Rates at which drafts predict the next token, after a right and after a wrong prediction.

    Each utterance starts with the rates of all utterances so far.
    """

    def __init__(self):
        # [right, all] predictions, by whether the previous one was right; initially few are.
        self.counts = {True: [1.0, 2.0], False: [0.25, 1.0]}

    def begin(self) -> "AcceptanceRates":
        """Return an utterance's initial rates, which its own tokens soon change."""
        rates = AcceptanceRates()
        for key, (right, total) in self.counts.items():
            rates.counts[key] = [PRIOR_WEIGHT[key] * right / total, PRIOR_WEIGHT[key]]
        return rates

    def add(self, follows: bool, is_right: bool) -> None:
        """Count a prediction; `follows` is true if the previous prediction was right."""
        self.counts[follows][0] += is_right
        self.counts[follows][1] += 1

    def __getitem__(self, follows: bool) -> float:
        right, total = self.counts[follows]
        return right / total


@dataclass
class DraftPolicy:
    """Cost of a forward pass and acceptance rates so far, which determine the proposals."""

    forward_cost: int  # in tokens
    rates: AcceptanceRates = field(default_factory=AcceptanceRates)


class Draft:
    """Draft whose remaining part is found by edit distance as the hypothesis advances.

    The draft predicts each next token. Its acceptance rates give the chances of the remaining
    tokens.
    """

    def __init__(self, tokens: list[int], usual: AcceptanceRates | None = None):
        """
        Args:
          usual: rates of earlier utterances, updated with this utterance's tokens.
        """
        self.tokens, self.usual = tokens, usual or AcceptanceRates()
        self.follows = True  # the last prediction was right
        self.rates = self.usual.begin()
        # Edit distances between the hypothesis and each prefix of the draft.
        self.distances = list(range(len(tokens) + 1))

    def advance(self, token: int) -> None:
        """Align the draft to the hypothesis's next token, and update the rates."""
        if self.tokens:
            is_right = self.remaining[:1] == [token]
            for rates in (self.rates, self.usual):
                rates.add(self.follows, is_right)
        before, row = self.distances, [self.distances[0] + 1]
        for i, drafted in enumerate(self.tokens):
            row.append(min(before[i] + (drafted != token), before[i + 1] + 1, row[i] + 1))
        self.follows = min(row) == min(before)
        self.distances = row

    @property
    def remaining(self) -> list[int]:
        """Tokens after the prefix nearest to the hypothesis; of several, the longest prefix."""
        nearest = min(self.distances)
        return self.tokens[len(self.tokens) - self.distances[::-1].index(nearest) :]

    def chances(self) -> list[float]:
        """Return, for each remaining token, the probability that all tokens up to it are right."""
        first, later = self.rates[self.follows], self.rates[True]
        return [first * later**i for i in range(len(self.remaining))]


def best_draft_length(chances: list[list[float]], cost: int) -> int:
    """Return the number of draft tokens to verify for the least cost per generated token.

    The prompt in the first pass is ignored: its cost does not depend on this number.

    Args:
      chances: per utterance, see `Draft.chances`.
      cost: fixed cost of a forward pass, in tokens.
    """
    best, best_rate, generated = 0, 0.0, float(len(chances))
    for length in range(max(map(len, chances)) + 1):
        if length:
            generated += sum(row[length - 1] for row in chances if length <= len(row))
        rate = generated / (cost + len(chances) * (1 + length))
        if rate > best_rate:
            best, best_rate = length, rate
    return best
