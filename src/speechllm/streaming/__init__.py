"""Recognition while somebody speaks: audio block by block to partial and final texts."""
