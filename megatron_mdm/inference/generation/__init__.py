"""Text in, text out: requests, models exported or from a checkpoint, and the replay page."""
