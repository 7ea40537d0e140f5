"""Search over the LLM's output: greedy and beam."""
