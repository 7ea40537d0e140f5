"""Audio files to samples, resampling and filter-bank features."""
