"""Transcripts over HTTP, as OpenAI's API gives them."""
