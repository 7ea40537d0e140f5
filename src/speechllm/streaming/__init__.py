"""Streaming recognition: blocks of audio to partial and final texts."""
