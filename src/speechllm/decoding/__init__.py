"""Decoding of speech to transcripts: search, CTC drafts, hallucination detection, word times."""
