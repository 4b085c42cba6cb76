"""flashinf: exact quasi-linear autoregressive inference through torch.compile."""
