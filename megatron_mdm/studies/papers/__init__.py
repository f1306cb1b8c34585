"""The papers' own experiments as recipes: data, models, measurements, a table and a plot."""
