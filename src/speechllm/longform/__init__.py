"""Transcription of recordings of any length, with times."""
