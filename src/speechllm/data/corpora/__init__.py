"""Reading of corpora in common formats as utterances, and conversion to cuts."""
