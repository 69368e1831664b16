"""What a weight update is: low rank, dense or Fourier; its norms, spectra and angles, in numpy alone."""
