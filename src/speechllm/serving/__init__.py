"""HTTP server with OpenAI's transcription API."""
