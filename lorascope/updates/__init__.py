"""Weight updates (low-rank, dense or Fourier) and their norms, spectra and angles, in numpy only."""
