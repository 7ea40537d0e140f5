"""Number of draft tokens to propose, by the acceptance rates so far and the cost of a pass.

A forward pass mostly reads the weights, so a proposed token costs little, and saves a pass if it is
right. The rates are those of the utterances before, and soon those of the utterance itself.
"""

from dataclasses import dataclass, field

from torch import nn

CPU_FORWARD_COST = 64  # tokens: measured in float32 for LLMs of 0.5B
# An H200 at 75 % of 790 TFLOP/s and 80 % of 4.8 TB/s reads a weight while it computes 154 tokens.
GPU_READ_COST, GPU_FLOPS = 154, 590e12
GPU_LAYER_LAUNCH = 30 * 4e-6  # s: kernels of a layer


def forward_cost(llm: nn.Module) -> int:
    """Return the fixed cost of a forward pass, in tokens that could be computed in that time.

    On a GPU it is the time to read the weights and to launch the kernels; a token takes 2 FLOPs per
    parameter.
    """
    if llm.device.type == "cpu":
        return CPU_FORWARD_COST
    launches = GPU_LAYER_LAUNCH * llm.config.num_hidden_layers
    return GPU_READ_COST + round(launches * GPU_FLOPS / (2 * llm.num_parameters()))


# Predictions that the earlier utterances count as: few, so that the own tokens soon prevail.
PRIOR_WEIGHT = {True: 2.0, False: 0.75}


class AcceptanceRates:
    """Counts how often drafts predict the next token, after a right and after a wrong prediction.

    The rates of all utterances so far are what the next one begins with.
    """

    def __init__(self):
        # Right and all predictions by whether the one before was right. The first utterances
        # begin with little trust.
        self.counts = {True: [1.0, 2.0], False: [0.25, 1.0]}

    def begin(self) -> "AcceptanceRates":
        """Return the rates as those of an utterance: its own tokens soon change them."""
        rates = AcceptanceRates()
        for key, (right, total) in self.counts.items():
            rates.counts[key] = [PRIOR_WEIGHT[key] * right / total, PRIOR_WEIGHT[key]]
        return rates

    def add(self, follows: bool, is_right: bool) -> None:
        """Count a prediction; `follows` if the one before was right."""
        self.counts[follows][0] += is_right
        self.counts[follows][1] += 1

    def __getitem__(self, follows: bool) -> float:
        right, total = self.counts[follows]
        return right / total


@dataclass
class DraftPolicy:
    """The cost of a forward pass, and the acceptance rates so far: proposals follow from both."""

    forward_cost: int  # in tokens
    rates: AcceptanceRates = field(default_factory=AcceptanceRates)


class Draft:
    """The remaining part of a draft, by edit distance, as the hypothesis advances.

    The draft predicts each next token. How often it was right gives the chances of the tokens to
    come.
    """

    def __init__(self, tokens: list[int], usual: AcceptanceRates | None = None):
        """
        Args:
          usual: rates of earlier utterances, to which the tokens of this one are added.
        """
        self.tokens, self.usual = tokens, usual or AcceptanceRates()
        self.follows = True  # the last prediction was right
        self.rates = self.usual.begin()
        # Edit distances between the hypothesis and each prefix of the draft.
        self.distances = list(range(len(tokens) + 1))

    def advance(self, token: int) -> None:
        """Align the draft to the next token of the hypothesis, and learn from it."""
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
        """Tokens after the prefix nearest to the hypothesis; the longest of several."""
        nearest = min(self.distances)
        return self.tokens[len(self.tokens) - self.distances[::-1].index(nearest) :]

    def chances(self) -> list[float]:
        """Return for each remaining token the probability that it and all before it are right."""
        first, later = self.rates[self.follows], self.rates[True]
        return [first * later**i for i in range(len(self.remaining))]


def best_draft_length(chances: list[list[float]], cost: int) -> int:
    """Return the number of draft tokens to verify at the least cost per generated token.

    The prompt in the first pass does not count: its cost is the same for all numbers.

    Args:
      chances: for each utterance, see `Draft.chances`.
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
