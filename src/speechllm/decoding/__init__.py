"""From speech to transcripts: drafts, greedy and beam search, guard, times of words."""
