"""Engine, trainer loop, optimizer, schedule and validation."""
