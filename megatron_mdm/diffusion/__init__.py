"""The science: masking, objectives, likelihood and samplers in plain numpy and torch."""
