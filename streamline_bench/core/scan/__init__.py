"""The similarity of hidden states at pairs of layer boundaries."""
