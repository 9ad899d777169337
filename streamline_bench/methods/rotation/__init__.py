"""Methods that rotate the residual stream and cut its width."""
