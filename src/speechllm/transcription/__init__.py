"""Recordings of any length to transcripts with times."""
