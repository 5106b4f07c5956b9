"""Budget-Aware Regularization (Lemaire et al., CVPR 2019)."""
