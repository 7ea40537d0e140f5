"""What Prometheus may ask."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from speechllm.serving.places import Places

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
PARTS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Of one server."""

    def __init__(self, places: Places):
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter(
            "asr_requests", "Transcriptions by status; 499: the client went", ["status"], **own
        )
        self.request_seconds = Histogram(
            "asr_request_seconds",
            "From its first byte to its answer's last",
            buckets=SECONDS,
            **own,
        )
        self.audio_seconds = Counter("asr_audio_seconds", "Sound of answered requests", **own)
        self.batch_parts = Histogram(
            "asr_batch_parts", "Parts of recordings in a batch", buckets=PARTS, **own
        )
        in_progress = Gauge("asr_requests_in_progress", "Requests that hold a place", **own)
        in_progress.set_function(lambda: places.requests)
        waiting = Gauge("asr_waiting_audio_seconds", "Sound in memory", **own)
        waiting.set_function(lambda: places.seconds)
        ProcessCollector(**own)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
