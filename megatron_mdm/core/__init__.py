"""What every room stands on: errors, whole files, the place of a process among others."""
