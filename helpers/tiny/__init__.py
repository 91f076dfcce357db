"""The embedded tiny model: a synthetic world of known truth, its training, its scores and its checkpoint."""
