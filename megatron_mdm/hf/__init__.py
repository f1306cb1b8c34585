"""The exported model, whose files import nothing of ours, and the folder it travels in."""
