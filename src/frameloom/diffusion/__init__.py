"""The shared machinery of diffusion and flow models.

A path says how data and noise are mixed, a denoiser estimates both from the mixture, a guide combines estimates, a
step goes on to the next noise level, a plan says which frames are at which level when, and `run.sample` is the one loop
over them. Time is 0 at the data and larger where noisier, of shape `(b,)` or `(b, t)`.
"""
