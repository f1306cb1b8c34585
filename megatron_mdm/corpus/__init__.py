"""From text to token shards: readers, tokenizers, preprocessing."""
