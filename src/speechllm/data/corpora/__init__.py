"""Read corpora in their usual forms as utterances, and convert these to cuts."""
