"""Corpora in the forms they come in, to utterances, to cuts."""
