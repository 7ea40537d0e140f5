"""Readers for corpora in common formats, and conversion of their utterances to cuts."""
