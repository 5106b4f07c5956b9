"""Budget-aware pruning of convolutional networks, from training to a measured artifact."""
