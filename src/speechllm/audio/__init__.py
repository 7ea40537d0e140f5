"""Audio decoding, resampling, voice activity detection and filter-bank features."""
