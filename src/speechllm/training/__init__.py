"""The training loop and what it needs; knows neither encoders nor LLMs."""
