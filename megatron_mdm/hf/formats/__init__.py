"""What checkpoints of each format call their tensors, and how those turn into ours and back."""
