"""Transcription of recordings of any length, with word times."""
