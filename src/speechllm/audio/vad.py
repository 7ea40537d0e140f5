"""Voice activity detection with Silero VAD, whose package includes the model."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

WINDOW = 512  # samples, 32 ms
CONTEXT = 64  # samples before each window that are part of the model's input


class SpeechDetector:
    """Estimates the speech probability over time.

    The package calls its model window by window; here all windows are encoded at once, and the LSTM
    and the decoder run over the whole sequence, in a fifth of the time.
    """

    def __init__(self):
        threads = torch.get_num_threads()
        from silero_vad import load_silero_vad  # sets the number of threads to 1

        torch.set_num_threads(threads)
        model = load_silero_vad()._model
        self.extract, self.encoder = model.run_extractors, model.encoder
        self.decoder = model.decoder.decoder
        cell = model.decoder.rnn.state_dict()
        self.lstm = nn.LSTM(cell["weight_ih"].size(1), cell["weight_hh"].size(1))
        self.lstm.load_state_dict({f"{name}_l0": weights for name, weights in cell.items()})

    @torch.inference_mode()
    def __call__(self, recordings: list[Tensor]) -> list[Tensor]:
        """Return a speech probability per 32 ms window for each recording of 16 kHz samples."""
        lens = [-(-len(one) // WINDOW) for one in recordings]
        samples = pad_sequence(recordings, True)
        samples = F.pad(samples, (CONTEXT, max(lens) * WINDOW - samples.size(1)))
        windows = samples.unfold(1, CONTEXT + WINDOW, WINDOW).transpose(0, 1)  # (T, B, N)
        encoded = self.encoder(self.extract(windows.flatten(0, 1)))[:, :, -1]
        hidden, _ = self.lstm(encoded.unflatten(0, windows.shape[:2]))
        probabilities = self.decoder(hidden.flatten(0, 1)[:, :, None]).view(hidden.shape[:2])
        return [own[:length] for own, length in zip(probabilities.T, lens)]
